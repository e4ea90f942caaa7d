// Softmax cross entropy with lanes across rows: a strip of neighbouring rows goes through the classes together.
//
// A strip is W vectors wide where all its rows are adjacent in memory (one row apart: one element apart), so that
// several cache lines of a class are read at once; elsewhere it is one vector wide and its lanes are copied one by one.
// A strip with fewer rows than lanes (the last of a range) repeats its last row in the idle lanes and never stores
// those.
//
// Classes are taken from memory a block at a time and worked on from there: where they are a power of two apart, the
// caches hold only a few of them at once, and reading them again would mean to fetch them again. As in
// softmax_ce_along.h, sums are against the largest logit so far.
#pragma once

#include <type_traits>

#include "../softmax_ce_row.h"
#include "vector.h"

namespace torchce::cpu::TORCHCE_LEVEL::across {

using namespace softmax_ce;

constexpr int kWide = 8;    // vectors in a strip of adjacent rows
constexpr int kBlock = 32;  // classes: 16 KiB of AVX-512 vectors

// Values of a block of classes for a strip of rows.
template <class A, int W>
struct Block {
  Lanes<A> values[kBlock][W];
};

// The rows of one strip in one operand.
template <class A, class T, int W>
struct Strip {
  static constexpr int kRows = W * kLanes<A>;
  T* first;
  int64_t class_stride;
  int count;
  bool adjacent;
  int64_t offsets[kRows];  // from the first row, in elements; only where the rows are not adjacent

  Strip(const Rows& rows, T* data, const RowStrides& strides, int64_t row, int rows_here)
      : class_stride(strides.classes),
        count(rows_here),
        adjacent(rows_here == kRows && adjacent_rows(rows, strides, row, rows_here)) {
    RowPosition at(rows, row);
    const int64_t base = at.offset(strides);
    first = data + base;
    if (adjacent) return;
    for (int l = 0; l < kRows; ++l) {
      offsets[l] = at.offset(strides) - base;
      if (l + 1 < count) at.advance(rows);
    }
  }

  static bool adjacent_rows(const Rows& rows, const RowStrides& strides, int64_t row, int rows_here) {
    if (rows.inner == 1) return strides.outer == 1;
    return strides.inner == 1 && row % rows.inner + rows_here <= rows.inner;
  }

  // Calls body(first class) for squares of as many classes as a vector has lanes. The last one overlaps its neighbour
  // unless they divide the classes of the block.
  template <class F>
  TORCHCE_SIMD static void for_each_square(int classes, F body) {
    int c = 0;
    for (; c + kLanes<A> <= classes; c += kLanes<A>) body(c);
    if (c < classes) body(classes - kLanes<A>);
  }

  // Has the caches fetch vector w of a class of the strip that comes next: as many classes as a strip has, each on
  // another page, are more than the hardware follows by itself. Two lines of a class at a time would be one too many.
  template <int kForWriting>
  TORCHCE_SIMD void prefetch_next(int64_t k, int w) const {
    constexpr int kLine = 64;
    if (!adjacent || w * kLanes<A> * sizeof(T) % kLine != 0) return;
    __builtin_prefetch(first + k * class_stride + kRows + w * kLanes<A>, kForWriting, 2);
  }

  // Classes k to k + classes - 1.
  TORCHCE_SIMD void read(int64_t k, int classes, Block<A, W>& block) const {
    if (adjacent) {
      const T* p = first + k * class_stride;
      for (int c = 0; c < classes; ++c, p += class_stride) {
        for (int w = 0; w < W; ++w) block.values[c][w] = load<A>(p + w * kLanes<A>);
      }
      return;
    }
    if (W == 1 && class_stride == 1 && classes >= kLanes<A>) {
      for_each_square(classes, [&](int c) {
        Lanes<A> square[kLanes<A>];
        for (int l = 0; l < kLanes<A>; ++l) square[l] = load<A>(first + offsets[l] + k + c);
        transpose<A>(square);
        for (int l = 0; l < kLanes<A>; ++l) block.values[c + l][0] = square[l];
      });
      return;
    }
    std::remove_const_t<T> stored[kBlock][kRows];
    for (int l = 0; l < kRows; ++l) {
      const T* p = first + offsets[l] + k * class_stride;
      for (int c = 0; c < classes; ++c, p += class_stride) stored[c][l] = *p;
    }
    for (int c = 0; c < classes; ++c) {
      for (int w = 0; w < W; ++w) block.values[c][w] = load<A>(stored[c] + w * kLanes<A>);
    }
  }

  TORCHCE_SIMD void write(int64_t k, int classes, const Block<A, W>& block) const {
    if (adjacent) {
      T* p = first + k * class_stride;
      const int64_t step = class_stride;  // what is stored might be this object, for all the compiler knows
      for (int c = 0; c < classes; ++c, p += step) {
        for (int w = 0; w < W; ++w) store(p + w * kLanes<A>, block.values[c][w]);
      }
      return;
    }
    if (W == 1 && class_stride == 1 && classes >= kLanes<A>) {
      for_each_square(classes, [&](int c) {
        Lanes<A> square[kLanes<A>];
        for (int l = 0; l < kLanes<A>; ++l) square[l] = block.values[c + l][0];
        transpose<A>(square);
        for (int l = 0; l < count; ++l) store(first + offsets[l] + k + c, square[l]);
      });
      return;
    }
    T stored[kBlock][kRows];
    for (int c = 0; c < classes; ++c) {
      for (int w = 0; w < W; ++w) store(stored[c] + w * kLanes<A>, block.values[c][w]);
    }
    const int64_t step = class_stride;
    for (int l = 0; l < count; ++l) {
      T* p = first + offsets[l] + k * step;
      for (int c = 0; c < classes; ++c, p += step) *p = stored[c][l];
    }
  }
};

// The strip's targets, seen as the coefficients u_k of its rows.
template <class Target, class A, int W>
struct Coefficients {
  const A* weight;
  int64_t k = 0;
  explicit Coefficients(const Rows& rows, int64_t, int) : weight(static_cast<const A*>(rows.weight)) {}
  TORCHCE_SIMD void read(int64_t first, int) { k = first; }
  // Of class c of the block that was read.
  TORCHCE_SIMD Lanes<A> at(int c, int) const { return broadcast(weight == nullptr ? A(1) : weight[k + c]); }
};

template <class P, class A, int W>
struct Coefficients<Probabilities<P>, A, W> {
  const A* weight;
  A label_smoothing, classes;
  Strip<A, const P, W> target;
  Block<A, W> block;
  int64_t k = 0;

  explicit Coefficients(const Rows& rows, int64_t row, int count)
      : weight(static_cast<const A*>(rows.weight)),
        label_smoothing(A(rows.label_smoothing)),
        classes(A(rows.classes)),
        target(rows, static_cast<const P*>(rows.target), rows.target_strides, row, count) {}
  TORCHCE_SIMD void read(int64_t first, int count) {
    k = first;
    target.read(first, count, block);
  }
  TORCHCE_SIMD Lanes<A> at(int c, int w) const {
    const Lanes<A> class_weight = broadcast(weight == nullptr ? A(1) : weight[k + c]);
    return probability_coefficient(block.values[c][w], class_weight, label_smoothing, classes);
  }
};

// Calls body(first class, classes) for the blocks of all classes.
template <class F>
TORCHCE_SIMD void for_each_block(int64_t classes, F body) {
  for (int64_t k = 0; k < classes; k += kBlock) body(k, int(classes - k < kBlock ? classes - k : kBlock));
}

// kLanes values a lane each, as an array that scalar code fills.
template <class A, int W>
struct PerRow {
  A values[W * kLanes<A>];
  A& operator[](int l) { return values[l]; }
  TORCHCE_SIMD Lanes<A> lanes(int w) const { return load<A>(values + w * kLanes<A>); }
  TORCHCE_SIMD void set(int w, Lanes<A> v) { store(values + w * kLanes<A>, v); }
};

// The class indices of a strip.
template <class A, int W>
struct IndexedStrip {
  static constexpr int kRows = W * kLanes<A>;
  int count;
  int64_t index[kRows];
  RowKind kind[kRows];
  PerRow<A, W> weight, kept;  // weight: of kept rows, else 0; kept: 1, or 0 for ignored rows and idle lanes
  A label_smoothing, classes;
  int first_bad = -1;
  bool all_kept = true;

  IndexedStrip(const Rows& rows, int64_t row, int count)
      : count(count), label_smoothing(A(rows.label_smoothing)), classes(A(rows.classes)) {
    const A* weights = static_cast<const A*>(rows.weight);
    RowPosition at(rows, row);
    for (int l = 0; l < kRows; ++l) {
      const TargetClass target(rows, at);
      if (l + 1 < count) at.advance(rows);
      const bool is_kept = l < count && target.kind == RowKind::kept;
      index[l] = target.index;
      kind[l] = target.kind;
      weight[l] = !is_kept ? A(0) : weights == nullptr ? A(1) : weights[target.index];
      kept[l] = l < count && target.kind != RowKind::ignored ? A(1) : A(0);
      if (target.kind == RowKind::bad && first_bad < 0) first_bad = l;
      if (target.kind == RowKind::ignored) all_kept = false;
    }
  }

  TORCHCE_SIMD IndexTarget<Lanes<A>, A> coefficients(int w) const {
    return {weight.lanes(w), label_smoothing, classes};
  }

  // Calls f(row of the strip, the row's value at its target class) for the classes k to k + classes - 1.
  template <class F>
  TORCHCE_SIMD void for_each_hot(int64_t k, int classes, Block<A, W>& block, F f) const {
    A(*values)[kRows] = reinterpret_cast<A(*)[kRows]>(block.values);
    for (int l = 0; l < count; ++l) {
      const uint64_t c = uint64_t(index[l] - k);
      if (c < uint64_t(classes)) f(l, values[c][l]);
    }
  }
};

// Splits a range of rows into strips and calls body(integral constant W, first row, rows in the strip).
template <int W>
struct Wide {
  static constexpr int value = W;
};
template <class A, class F>
TORCHCE_SIMD void for_each_strip(const Rows& rows, const RowStrides& strides, int64_t row_begin, int64_t row_end,
                                 F body) {
  constexpr int64_t kWideRows = kWide * kLanes<A>;
  for (int64_t row = row_begin; row < row_end;) {
    if (row + kWideRows <= row_end && Strip<A, char, 1>::adjacent_rows(rows, strides, row, kWideRows)) {
      body(Wide<kWide>{}, row, int(kWideRows));
      row += kWideRows;
    } else {
      const int count = int(row_end - row < kLanes<A> ? row_end - row : kLanes<A>);
      body(Wide<1>{}, row, count);
      row += count;
    }
  }
}

// What the rows of a strip add up to, a lane each.
template <class T, class Target, int W>
struct StripSums {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  V max[W];
  CompensatedSum<V> exponentials[W];
  CompensatedSum<V> coefficients[W];  // sum_k u_k
  CompensatedSum<V> gaps[W];          // sum_k u_k (x_k - max)

  // `look` sees every block of logits: look(first class, classes, block).
  template <class Look>
  TORCHCE_SIMD StripSums(const Strip<A, const T, W>& logits, Coefficients<Target, A, W>& u, int64_t classes,
                         Look look) {
    for (V& m : max) m = broadcast(kLowest<A>);
    for_each_block(classes, [&](int64_t k, int count) {
      Block<A, W> x;
      logits.read(k, count, x);
      look(k, count, x);
      if constexpr (Target::kSpread) u.read(k, count);
      for (int w = 0; w < W; ++w) {
        for (int c = 0; c < count; ++c) logits.template prefetch_next<0>(k + c, w);
        add(x, u, count, w);
      }
    });
    for (int w = 0; w < W; ++w) {
      // A row with a logit has a term of 1. One of -inf alone has a maximum of -inf and, like one with a NaN, no sum.
      const auto has_sum = exponentials[w].sum >= 1;
      exponentials[w].sum = math::select(has_sum, exponentials[w].sum, broadcast(A(__builtin_nan(""))));
      max[w] = math::select(has_sum, max[w], broadcast(-math::kInfinity<A>));
    }
  }

 private:
  math::ExpInSum<V> exp;

  TORCHCE_SIMD void add(const Block<A, W>& x, const Coefficients<Target, A, W>& u, int count, int w) {
    V new_max = max[w];
    for (int c = 0; c < count; ++c) new_max = larger(new_max, x.values[c][w]);
    exponentials[w].scale(exp(max[w] - new_max));
    V sum{}, sum_coefficients{}, sum_gaps{};
    for (int c = 0; c < count; ++c) {
      sum += exp(x.values[c][w] - new_max);
      if constexpr (Target::kSpread) {
        const V coefficient = u.at(c, w);
        sum_coefficients += coefficient;
        sum_gaps += weighted_gap(coefficient, x.values[c][w], new_max);
      }
    }
    exponentials[w].add(sum);
    if constexpr (Target::kSpread) {
      gaps[w].add(weighted_gap(coefficients[w].sum, max[w], new_max));
      gaps[w].add(sum_gaps);
      coefficients[w].add(sum_coefficients);
    }
    max[w] = new_max;
  }
};

template <class T, class Target, int W>
TORCHCE_SIMD void forward_strip(const Forward& call, int64_t row, int count, Partial* partial) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  const Rows& rows = call.rows;
  const Strip<A, const T, W> logits(rows, static_cast<const T*>(rows.logits), rows.logits_strides, row, count);
  Coefficients<Target, A, W> coefficients(rows, row, count);
  PerRow<A, W> loss, maxima, sums, spread;
  SumInDouble<A> loss_sum, weight_sum;
  const auto sum_up = [&](auto look) { return StripSums<T, Target, W>(logits, coefficients, rows.classes, look); };
  const auto store_sums = [&](const StripSums<T, Target, W>& of) {
    for (int w = 0; w < W; ++w) {
      maxima.set(w, of.max[w]);
      sums.set(w, of.exponentials[w].sum);
      spread.set(w, of.coefficients[w].sum);
    }
  };
  if constexpr (Target::kProbabilities) {
    const auto of = sum_up([](int64_t, int, Block<A, W>&) {});
    store_sums(of);
    for (int w = 0; w < W; ++w) {
      const V log_sum = math::log(of.exponentials[w].sum);
      loss.set(w, spread_loss(broadcast<A>(1), of.coefficients[w].sum, of.gaps[w].sum, log_sum));
    }
  } else {
    const IndexedStrip<A, W> targets(rows, row, count);
    PerRow<A, W> hot_logits;
    const auto of = sum_up([&](int64_t k, int classes, Block<A, W>& block) {
      targets.for_each_hot(k, classes, block, [&](int l, A x) { hot_logits[l] = x; });
    });
    store_sums(of);
    for (int w = 0; w < W; ++w) {
      const V log_sum = math::log(of.exponentials[w].sum);
      const auto target = targets.coefficients(w);
      V v = hot_loss(target.hot, hot_logits.lanes(w), of.max[w], log_sum);
      if constexpr (Target::kSpread) {
        v += spread_loss(broadcast(target.uniform), of.coefficients[w].sum, of.gaps[w].sum, log_sum);
      }
      loss.set(w, math::select(targets.kept.lanes(w) == V{}, V{}, v));
    }
    for (int w = 0; w < W; ++w) weight_sum.add(targets.weight.lanes(w));
    partial->weight += weight_sum.value();
    if (targets.first_bad >= 0 && partial->bad_row < 0) partial->bad_row = row + targets.first_bad;
  }
  const Statistics<A> statistics(rows, call.statistics);
  for (int l = 0; l < count; ++l) {
    statistics.max[row + l] = maxima[l];
    statistics.sum[row + l] = sums[l];
    if constexpr (Target::kProbabilities) statistics.spread[row + l] = spread[l];
  }
  for (int l = count; l < W * kLanes<A>; ++l) loss[l] = 0;
  for (int w = 0; w < W; ++w) loss_sum.add(loss.lanes(w));
  partial->loss += loss_sum.value();
  if (rows.reduction == Reduction::none) {
    for (int l = 0; l < count; ++l) store_as(call.loss_dtype, call.loss, row + l, loss[l]);
  }
}

template <class T, class Target>
void forward(const Forward& call, int64_t row_begin, int64_t row_end, Partial* partial) {
  for_each_strip<Accumulate<T>>(
      call.rows, call.rows.logits_strides, row_begin, row_end,
      [&](auto wide, int64_t row, int count) { forward_strip<T, Target, wide.value>(call, row, count, partial); });
}

template <class T, class Target, int W>
TORCHCE_SIMD void backward_strip(const Backward& call, int64_t row, int count) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  const Rows& rows = call.rows;
  const Strip<A, const T, W> logits(rows, static_cast<const T*>(rows.logits), rows.logits_strides, row, count);
  const Strip<A, T, W> grad(rows, static_cast<T*>(call.grad), call.grad_strides, row, count);
  Coefficients<Target, A, W> coefficients(rows, row, count);
  const Statistics<A> statistics(rows, call.statistics);

  const bool in_place = call.grad == rows.logits;
  PerRow<A, W> max, scale, spread;
  const auto fill = [&](auto factor_of) {
    RowPosition at(rows, row);
    for (int l = count; l < W * kLanes<A>; ++l) max[l] = scale[l] = spread[l] = 0;
    const A grad_output = rows.reduction == Reduction::none ? A(0) : row_grad_output<A>(call, at);
    for (int l = 0; l < count; ++l, at.advance(rows)) {
      const A g = rows.reduction == Reduction::none ? row_grad_output<A>(call, at) : grad_output;
      max[l] = statistics.max[row + l];
      scale[l] = factor_of(l, g) / statistics.sum[row + l];
    }
  };
  const auto write_classes = [&](auto finish) {
    for_each_block(rows.classes, [&](int64_t k, int classes) {
      Block<A, W> block;
      logits.read(k, classes, block);
      if constexpr (Target::kSpread) coefficients.read(k, classes);
      for (int w = 0; w < W; ++w) {
        const math::ScaledExp<V, kSixteenBits<T>> scaled_exp(scale.lanes(w));
        const V max_lanes = max.lanes(w), spread_lanes = spread.lanes(w);
        for (int c = 0; c < classes; ++c) {
          logits.template prefetch_next<0>(k + c, w);
          if (!in_place) grad.template prefetch_next<1>(k + c, w);
          V& g = block.values[c][w];
          g = scaled_exp(g - max_lanes);
          if constexpr (Target::kSpread) g -= spread_lanes * coefficients.at(c, w);
        }
      }
      finish(k, classes, block);
      grad.write(k, classes, block);
    });
  };

  if constexpr (Target::kProbabilities) {
    fill([&](int l, A g) {
      spread[l] = g;
      return g * statistics.spread[row + l];
    });
    write_classes([](int64_t, int, Block<A, W>&) {});
  } else {
    const IndexedStrip<A, W> targets(rows, row, count);
    const A sum_weights = sum_of_class_weights<A>(call);
    PerRow<A, W> hot;
    for (int w = 0; w < W; ++w) hot.set(w, targets.coefficients(w).hot);
    const A uniform = targets.coefficients(0).uniform;
    fill([&](int l, A g) {
      if (targets.kind[l] == RowKind::bad) g = A(__builtin_nan(""));
      hot[l] *= g;
      spread[l] = g * uniform;
      return hot[l] + spread[l] * sum_weights;
    });
    write_classes([&](int64_t k, int classes, Block<A, W>& block) {
      targets.for_each_hot(k, classes, block, [&](int l, A& g) { g -= hot[l]; });
      if (targets.all_kept) return;
      for (int c = 0; c < classes; ++c) {
        for (int w = 0; w < W; ++w) {
          block.values[c][w] = math::select(targets.kept.lanes(w) == V{}, V{}, block.values[c][w]);
        }
      }
    });
  }
}

template <class T, class Target>
void backward(const Backward& call, int64_t row_begin, int64_t row_end) {
  for_each_strip<Accumulate<T>>(
      call.rows, call.rows.logits_strides, row_begin, row_end,
      [&](auto wide, int64_t row, int count) { backward_strip<T, Target, wide.value>(call, row, count); });
}

template <class T, class Target>
void backward_target(const Backward& call, int64_t row_begin, int64_t row_end) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  using P = typename Target::Storage;
  const Rows& rows = call.rows;
  const Statistics<A> statistics(rows, call.statistics);
  const A* weight = static_cast<const A*>(rows.weight);
  for_each_strip<A>(rows, rows.logits_strides, row_begin, row_end, [&](auto wide, int64_t row, int count) {
    constexpr int W = wide.value;
    const Strip<A, const T, W> logits(rows, static_cast<const T*>(rows.logits), rows.logits_strides, row, count);
    const Strip<A, P, W> grad(rows, static_cast<P*>(call.grad), call.grad_strides, row, count);
    PerRow<A, W> max, log_sum, grad_output;
    for (int l = count; l < W * kLanes<A>; ++l) max[l] = log_sum[l] = grad_output[l] = 0;
    RowPosition at(rows, row);
    for (int l = 0; l < count; ++l, at.advance(rows)) {
      max[l] = statistics.max[row + l];
      log_sum[l] = math::log(statistics.sum[row + l]);
      grad_output[l] = row_grad_output<A>(call, at);
    }
    for_each_block(rows.classes, [&](int64_t k, int classes) {
      Block<A, W> block;
      logits.read(k, classes, block);
      for (int c = 0; c < classes; ++c) {
        const V class_weight = broadcast(weight == nullptr ? A(1) : weight[k + c]);
        for (int w = 0; w < W; ++w) {
          const V g = target_gradient(block.values[c][w], class_weight, max.lanes(w), log_sum.lanes(w),
                                      A(rows.label_smoothing));
          block.values[c][w] = g * grad_output.lanes(w);
        }
      }
      grad.write(k, classes, block);
    });
  });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::across
