// Softmax cross entropy with lanes along each row. Rows have at least one full pack (vector.h) of adjacent classes.
//
// Bulk and remainder: packs start at 0, P, 2P, ... and the last one at C - P, so it overlaps its neighbour unless P
// divides C (C = 1001, P = 32: it covers 969..1000, of which 969..991 were done before). Sums mask what was done
// before. A gradient that overwrites its logits would transform the overlap twice, so the last pack is read before any
// is written.
//
// A row is read once. Its exponentials are summed against the largest logit of its first pack, until one turns up that
// is much larger, which is looked at once a block: then the sum shrinks (Milakov and Gimelshein 2018, arXiv:1805.02867)
// and the block is taken again.
#pragma once

#include "softmax_ce_per_row.h"

namespace torchce::cpu::TORCHCE_LEVEL::along {

constexpr int kStrip = 4;  // vectors of rows whose sums are folded together

// u_k of the classes of a pack from k on.
template <class T, class Target>
struct Coefficients {
  using A = Accumulate<T>;
  const A* weight;
  const void* target;
  A label_smoothing, classes;

  Coefficients(const Rows& rows, RowPosition at)
      : weight(static_cast<const A*>(rows.weight)),
        target(nullptr),
        label_smoothing(A(rows.label_smoothing)),
        classes(A(rows.classes)) {
    if constexpr (Target::kProbabilities) {
      target = static_cast<const typename Target::Storage*>(rows.target) + at.offset(rows.target_strides);
    }
  }

  TORCHCE_SIMD Pack<T> at(int64_t k) const {
    Pack<T> u = {broadcast<A>(1), broadcast<A>(1)};
    if (weight != nullptr) u = Pack<T>::load(weight + k);
    if constexpr (Target::kProbabilities) {
      const auto t = Pack<T>::load(static_cast<const typename Target::Storage*>(target) + k);
      if (weight == nullptr && label_smoothing == 0) return t;
      for (int i = 0; i < u.kVectors; ++i) u.v[i] = probability_coefficient(t.v[i], u.v[i], label_smoothing, classes);
    }
    return u;
  }
};

// Sums of a strip's rows, each in the lanes of a vector, to be folded together.
template <class Target, class A>
struct LaneSums {
  using V = Lanes<A>;
  static constexpr int L = kLanes<A>, kRows = kStrip * L, kSpreadRows = Target::kSpread ? kRows : 1;
  PerRow<A, kStrip> reference;
  V max[kRows], exponentials[kRows];
  V coefficients[kSpreadRows], gaps[kSpreadRows];

  // Of a row that is left out, or of none.
  TORCHCE_SIMD void leave_out(int l) {
    reference[l] = 0;
    max[l] = V{};
    exponentials[l] = broadcast(A(1) / L);
    if constexpr (Target::kSpread) coefficients[l] = gaps[l] = V{};
  }

  TORCHCE_SIMD void fold(Sums<Target, A, kStrip>& sums, int vectors) const {
    const auto add = [](auto a, auto b) { return a + b; };
    for (int w = 0; w < vectors; ++w) sums.reference.set(w, reference.lanes(w));
    fold(sums.max, max, vectors, [](auto a, auto b) { return larger(a, b); });
    fold(sums.exponentials, exponentials, vectors, add);
    if constexpr (Target::kSpread) {
      fold(sums.coefficients, coefficients, vectors, add);
      fold(sums.gaps, gaps, vectors, add);
    }
  }

 private:
  template <class F>
  TORCHCE_SIMD static void fold(PerRow<A, kStrip>& folded, const V (&lanes)[kRows], int vectors, F combine) {
    for (int w = 0; w < vectors; ++w) folded.set(w, fold_each(reinterpret_cast<const V(&)[L]>(lanes[w * L]), combine));
  }
};

// Adds up one row of logits.
template <class T, class Target>
class RowSums {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  static constexpr int kPacks = 16;  // of a block
  static constexpr int kAsCounted = 0, kRemainder = -1;
  // By how much a logit may exceed what sums are against. The difference of the two is rounded by up to 2^-22, and so
  // are the exponential and, beside the loss, the gap: the largest terms must not be far from the reference.
  static constexpr A kHeadroom = 8;

  math::ExpInSum<V> exp;
  A reference;  // what exponentials and gaps are against
  Largest<T> largest;
  CompensatedSum<V> exponentials, coefficients, gaps;

  // A block of packs from class k on: as many as the template says, or `count` (kAsCounted), or one of which the
  // classes before `begin` were in another (kRemainder).
  template <int kCount>
  TORCHCE_SIMD void add(const T* x, const Coefficients<T, Target>& u, int64_t k, int count, int64_t begin = 0) {
    constexpr int64_t P = Pack<T>::kSize;
    if constexpr (kCount > 0) count = kCount;
    Largest<T> largest_here = largest;
    V sum, sum_coefficients, sum_gaps;
    const auto sum_up = [&]() TORCHCE_HD_LAMBDA {
      const V from = broadcast(reference);
      sum = sum_coefficients = sum_gaps = V{};
#pragma GCC unroll 2
      for (int i = 0; i < count; ++i) {
        Pack<T> pack = Pack<T>::load(x + k + i * P);
        largest_here.add(x + k + i * P);
        if constexpr (kCount == kRemainder) pack = pack.from(begin - k, -math::kInfinity<A>);
        for (const V& v : pack.v) sum += exp(v - from);
        if constexpr (Target::kSpread) {
          Pack<T> of_pack = u.at(k + i * P);
          if constexpr (kCount == kRemainder) of_pack = of_pack.from(begin - k, 0);
          for (int j = 0; j < pack.kVectors; ++j) {
            sum_coefficients += of_pack.v[j];
            sum_gaps += weighted_gap(of_pack.v[j], pack.v[j], from);
          }
        }
      }
    };
    sum_up();
    const A max = max_of<A>(largest_here.lanes());
    if (max > reference + kHeadroom) {
      raise_to(max);
      sum_up();
    }
    largest = largest_here;
    exponentials.add(sum);
    if constexpr (Target::kSpread) {
      coefficients.add(sum_coefficients);
      gaps.add(sum_gaps);
    }
  }

  TORCHCE_SIMD void raise_to(A logit) {
    exponentials.scale(exp(broadcast(reference - logit)));
    if constexpr (Target::kSpread) gaps.add(weighted_gap(coefficients.sum, broadcast(reference), broadcast(logit)));
    reference = logit;
  }

 public:
  TORCHCE_SIMD RowSums(const T* x, int64_t classes, const Coefficients<T, Target>& u) {
    constexpr int64_t P = Pack<T>::kSize;
    largest.add(x);
    reference = max_of<A>(largest.lanes());
    int64_t k = 0;
    for (; k + kPacks * P <= classes; k += kPacks * P) add<kPacks>(x, u, k, kPacks);
    const int left = int((classes - k) / P);
    add<kAsCounted>(x, u, k, left);
    k += left * P;
    if (k < classes) add<kRemainder>(x, u, classes - P, 1, k);
  }

  TORCHCE_SIMD void write(LaneSums<Target, A>& sums, int l) const {
    sums.reference[l] = reference;
    sums.max[l] = largest.lanes();
    sums.exponentials[l] = exponentials.sum;
    if constexpr (Target::kSpread) {
      sums.coefficients[l] = coefficients.sum;
      sums.gaps[l] = gaps.sum;
    }
  }
};

// Calls body(first row, rows) for strips.
template <class A, class F>
TORCHCE_SIMD void for_each_strip(int64_t row_begin, int64_t row_end, F body) {
  constexpr int kRows = kStrip * kLanes<A>;
  for (int64_t row = row_begin; row < row_end; row += kRows) {
    body(row, int(row_end - row < kRows ? row_end - row : kRows));
  }
}

template <class T, class Target>
void forward(const Forward& original, int64_t row_begin, int64_t row_end, Partial* partial) {
  using A = Accumulate<T>;
  const Forward call = original;  // what is stored might be the original, for all the compiler knows
  const Rows& rows = call.rows;
  for_each_strip<A>(row_begin, row_end, [&](int64_t row, int count) TORCHCE_HD_LAMBDA {
    PerRow<A, kStrip> hot_logits{};
    const auto add_rows = [&](const IndexedStrip<A, kStrip>* targets) TORCHCE_HD_LAMBDA {
      LaneSums<Target, A> lane_sums;
      RowPosition at(rows, row);
      for (int l = 0; l < count; ++l, at.advance(rows)) {
        if (targets != nullptr && targets->kept[l] == 0) {
          lane_sums.leave_out(l);
          continue;
        }
        const T* x = static_cast<const T*>(rows.logits) + at.offset(rows.logits_strides);
        if (targets != nullptr) hot_logits[l] = load_one<A>(x + targets->index[l]);
        RowSums<T, Target>(x, rows.classes, Coefficients<T, Target>(rows, at)).write(lane_sums, l);
      }
      for (int l = count; l < vectors_of<A>(count) * kLanes<A>; ++l) lane_sums.leave_out(l);
      Sums<Target, A, kStrip> sums;
      lane_sums.fold(sums, vectors_of<A>(count));
      write_losses<Target, A, kStrip>(call, row, count, sums, targets, hot_logits, partial);
    };
    if constexpr (Target::kProbabilities) {
      add_rows(nullptr);
    } else {
      const IndexedStrip<A, kStrip> targets(rows, row, count);
      add_rows(&targets);
    }
  });
}

// grad_k = exp(x_k - max) scale - spread u_k, for every class.
template <class T, class Target, class A>
TORCHCE_SIMD void row_gradient(const T* x, T* grad, int64_t classes, A max, A scale, A spread,
                               const Coefficients<T, Target>& coefficients) {
  constexpr int64_t P = Pack<T>::kSize;
  const auto max_lanes = broadcast(max);
  const math::ScaledExp<Lanes<A>, kSixteenBits<T>> scaled_exp(broadcast(scale));
  const auto gradient = [&](int64_t k) {
    Pack<T> g = Pack<T>::load(x + k);
    for (auto& v : g.v) v = scaled_exp(v - max_lanes);
    if constexpr (Target::kSpread) {
      const Pack<T> u = coefficients.at(k);
      for (int i = 0; i < g.kVectors; ++i) g.v[i] -= spread * u.v[i];
    }
    return g;
  };
  const bool remainder = classes % P != 0;
  Pack<T> last{};
  if (remainder) last = gradient(classes - P);
  for (int64_t k = 0; k + P <= classes; k += P) gradient(k).template store<kNans<Target>>(grad + k);
  if (remainder) last.template store<kNans<Target>>(grad + classes - P);
}

template <class T, class Target>
void backward(const Backward& original, int64_t row_begin, int64_t row_end) {
  using A = Accumulate<T>;
  const Backward call = original;  // what is stored might be the original, for all the compiler knows
  const Rows& rows = call.rows;
  for_each_strip<A>(row_begin, row_end, [&](int64_t row, int count) TORCHCE_HD_LAMBDA {
    const auto write_rows = [&](const IndexedStrip<A, kStrip>* targets) TORCHCE_HD_LAMBDA {
      const Factors<A, kStrip> factors(call, row, count, targets);
      PerRow<A, kStrip> hot_gradients{};
      if (targets != nullptr) {  // before a logit may be overwritten
        RowPosition at(rows, row);
        for (int l = 0; l < count; ++l, at.advance(rows)) {
          const T* x = static_cast<const T*>(rows.logits) + at.offset(rows.logits_strides);
          hot_gradients[l] = load_one<A>(x + targets->index[l]);
        }
        for (int w = 0; w < vectors_of<A>(count); ++w) {
          const auto p = scaled_probability(hot_gradients.lanes(w), factors.max.lanes(w), factors.scale.lanes(w));
          hot_gradients.set(w, p - factors.spread.lanes(w) * targets->weight.lanes(w) - factors.hot.lanes(w));
        }
      }
      RowPosition at(rows, row);
      for (int l = 0; l < count; ++l, at.advance(rows)) {
        const T* x = static_cast<const T*>(rows.logits) + at.offset(rows.logits_strides);
        T* grad = static_cast<T*>(call.grad) + at.offset(call.grad_strides);
        if (targets != nullptr && targets->kept[l] == 0) {
          std::memset(static_cast<void*>(grad), 0, sizeof(T) * rows.classes);
          continue;
        }
        row_gradient<T, Target>(x, grad, rows.classes, factors.max[l], factors.scale[l], factors.spread[l],
                                Coefficients<T, Target>(rows, at));
        if (targets != nullptr) store_one(grad + targets->index[l], hot_gradients[l]);
      }
    };
    if constexpr (Target::kProbabilities) {
      write_rows(nullptr);
    } else {
      const IndexedStrip<A, kStrip> targets(rows, row, count);
      write_rows(&targets);
    }
  });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::along
