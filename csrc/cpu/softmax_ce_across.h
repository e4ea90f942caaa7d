// Softmax cross entropy with lanes across rows: a strip of neighbouring rows goes through the classes together.
//
// Classes are taken from memory a block at a time and worked on from there: where they are a power of two apart, the
// caches hold only a few of them at once, and reading them again would mean to fetch them again. Sums are against
// the largest logit of the first block until another exceeds it by much, each lane for itself.
#pragma once

#include "softmax_ce_strip.h"

namespace torchce::cpu::TORCHCE_LEVEL::across {

// Adds up the rows of a strip, a lane each.
template <class T, class Target, int W, class Coefficients>
class StripSums {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  using Sums = LogitSums<Target::kSpread, V, Coefficients::kKnownSum>;
  static constexpr int kPartialSums = 4;  // of a block, so that none gathers more than eight roundings

  math::ExpInSum<V> exp;
  // A logit may exceed the reference of its row's sum by this much: a reference raised for every block would make the
  // sum gather the errors of the exponentials that rescale it. Gaps, which are rounded beside the loss, allow less.
  static constexpr A kHeadroom = Target::kSpread ? 4 : 16;
  V reference[W], largest[W];
  CompensatedLogitSums<Target::kSpread, V> totals[W];

  TORCHCE_SIMD void add(const StripLogits<T, Target, W>& logits, int64_t k, int count, const Block<A, W>& x,
                        const Coefficients& u) {
    for (int w = 0; w < W; ++w) {
      // The first block starts the sums: nothing was added up that would have to be rescaled.
      V max = largest[w];
      for (int c = 0; c < count; ++c) max = larger_or_second(max, x.values[c][w]);
      if (k == 0) {
        reference[w] = max;
      } else {
        raise_to(math::select(max > reference[w] + kHeadroom, max, reference[w]), w);
      }
      largest[w] = max;
      const V from = reference[w];
      math::StridedSum<kPartialSums, Sums> of_block;
      of_block.add(count, [&](int c) TORCHCE_HD_LAMBDA {
        logits.template prefetch_next<0>(k + c, w);
        const V value = x.values[c][w];
        return Sums::of(exp(value - from), u.at(c, w), value, from);
      });
      const auto sums = of_block.value().complete(u.sum_of_block);
      if (k == 0) {
        totals[w].start(sums);
      } else {
        totals[w].add(sums);
      }
    }
  }

  TORCHCE_SIMD void raise_to(V logit, int w) {
    totals[w].rebase(reference[w], logit, math::exp_of_negative(reference[w] - logit));
    reference[w] = logit;
  }

 public:
  // Adds up all classes, and calls look(first class, classes, block) for every block of logits.
  template <class Look>
  TORCHCE_SIMD StripSums(const StripLogits<T, Target, W>& logits, Coefficients& u, int64_t classes, Look look) {
    for (int w = 0; w < W; ++w) largest[w] = broadcast(kLowest<A>);
    for_each_block(classes, [&](int64_t k, int count) TORCHCE_HD_LAMBDA {
      Block<A, W> x;
      logits.read(k, count, x);
      look(k, count, x);
      if constexpr (Target::kSpread) u.read_block(k, count);
      add(logits, k, count, x, u);
    });
  }

  TORCHCE_SIMD void write(SumsPerRow<Target, A, W>& sums) const {
    for (int w = 0; w < W; ++w) {
      sums.reference.set(w, reference[w]);
      sums.max.set(w, largest[w]);
      sums.exponentials.set(w, totals[w].exponentials.sum);
      if constexpr (Target::kSpread) {
        sums.coefficients.set(w, totals[w].coefficients.sum);
        sums.gaps.set(w, totals[w].gaps.sum);
      }
    }
  }
};

template <class T, class Target, int W>
TORCHCE_SIMD void forward_strip(const Forward& call, int64_t row, int count, Partial* partial) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const StripLogits<T, Target, W> logits(rows, row, count);
  SumsPerRow<Target, A, W> sums;
  PerRow<A, W> hot_logits{};
  const auto sum_up = [&](auto look) TORCHCE_HD_LAMBDA {
    with_coefficients<Target, A, W>(rows, row, count, [&](auto& coefficients) TORCHCE_HD_LAMBDA {
      StripSums<T, Target, W, std::remove_reference_t<decltype(coefficients)>>(logits, coefficients, rows.classes, look)
          .write(sums);
    });
    sums.against_max = rows.classes <= kBlockClasses;
  };
  if constexpr (Target::kProbabilities) {
    sum_up([](int64_t, int, Block<A, W>&) {});
    write_losses<Target, A, W>(call, row, count, sums, nullptr, hot_logits, partial);
  } else {
    const IndexedRows<A, W> targets(rows, row, count);
    sum_up([&](int64_t k, int classes, Block<A, W>& block) {
      for_each_hot(targets, k, classes, block, [&](int l, A x) { hot_logits[l] = x; });
    });
    write_losses<Target, A, W>(call, row, count, sums, &targets, hot_logits, partial);
  }
}

template <class T, class Target>
void forward(const Forward& call, int64_t row_begin, int64_t row_end, Partial* partial) {
  for_each_strip<Accumulate<T>, kWidest<Target>>(
      call.rows, call.rows.logits_strides, row_begin, row_end,
      [&](auto wide, int64_t row, int count) { forward_strip<T, Target, wide.value>(call, row, count, partial); });
}

// Makes of a block of values, the classes from k on, their gradients without the part that only the target class has.
// `look(class of the block, vector, value)` sees each value before. Exp: GradientExp or TiltedExp.
template <class Target, class Exp, class A, int W, class Coefficients, class Look>
TORCHCE_SIMD void to_gradients(Block<A, W>& block, int64_t k, int classes, Coefficients& coefficients,
                               const Factors<A, W, Exp::kTilted>& factors, Look look) {
  if constexpr (Target::kSpread) coefficients.read_block(k, classes);
  const Exp scaled_exp;
  for (int w = 0; w < W; ++w) {
    const auto scale = Exp::Scale::of(factors, w);
    const Lanes<A> max_lanes = factors.max.lanes(w), spread_lanes = factors.spread.lanes(w);
    for (int c = 0; c < classes; ++c) {
      Lanes<A>& g = block.values[c][w];
      look(c, w, g);
      g = scaled_exp(g - max_lanes, scale);
      if constexpr (Target::kSpread) g = class_gradient(g, spread_lanes, coefficients.at(c, w).of_gradient());
    }
  }
}

template <class T, class Target, class Exp, int W>
TORCHCE_SIMD void backward_strip(const Backward& call, int64_t row, int count) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  using Slopes = BlockSlopes<LogitOf<Target, T>, A, W>;
  using AllFactors = Factors<A, W, Exp::kTilted>;
  const Rows& rows = call.rows;
  const StripLogits<T, Target, W> logits(rows, row, count);
  const Strip<A, T, W> grad(rows, static_cast<T*>(call.grad), call.grad_strides, row, count);
  const bool in_place = call.grad == rows.logits;
  const auto write_classes_of = [&](auto& coefficients, const AllFactors& factors, auto finish) {
    for_each_block(rows.classes, [&](int64_t k, int classes) {
      Block<A, W> block;
      Slopes slopes;
      logits.read(k, classes, block);
      to_gradients<Target, Exp>(block, k, classes, coefficients, factors, [&](int c, int w, V value) TORCHCE_HD_LAMBDA {
        logits.template prefetch_next<0>(k + c, w);
        if (!in_place) grad.template prefetch_next<1>(k + c, w);
        slopes.take(logits.logit, c, w, value);
      });
      finish(k, classes, block, slopes);
      grad.template write<kNans<Target>>(k, classes, block);
    });
  };
  const auto write_classes = [&](const AllFactors& factors, auto finish) {
    with_coefficients<Target, A, W>(rows, row, count,
                                    [&](auto& coefficients) { write_classes_of(coefficients, factors, finish); });
  };

  if constexpr (Target::kProbabilities) {
    write_classes(AllFactors(call, row, count, nullptr), [](int64_t, int classes, Block<A, W>& block,
                                                            const Slopes& slopes) { slopes.multiply(classes, block); });
  } else {
    const IndexedRows<A, W> targets(rows, row, count);
    const AllFactors factors(call, row, count, &targets);
    write_classes(factors, [&](int64_t k, int classes, Block<A, W>& block, const Slopes& slopes) {
      for_each_hot(targets, k, classes, block, [&](int l, A& g) { g -= factors.hot[l]; });
      slopes.multiply(classes, block);
      if (!targets.any_ignored) return;
      for (int c = 0; c < classes; ++c) {
        for (int w = 0; w < W; ++w) {
          block.values[c][w] = math::select(factors.has_gradient.lanes(w) == V{}, V{}, block.values[c][w]);
        }
      }
    });
  }
}

template <class T, class Target, class Exp>
void backward(const Backward& call, int64_t row_begin, int64_t row_end) {
  for_each_strip<Accumulate<T>, kWidest<Target>>(
      call.rows, call.rows.logits_strides, row_begin, row_end,
      [&](auto wide, int64_t row, int count) { backward_strip<T, Target, Exp, wide.value>(call, row, count); });
}

template <class T, class Target>
void backward_target(const Backward& call, int64_t row_begin, int64_t row_end) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  using P = typename Target::Storage;
  const Rows& rows = call.rows;
  const Statistics<A> statistics(rows, call.statistics);
  const A* weight = static_cast<const A*>(rows.weight);
  const auto smoothing = smoothing_of<A>(rows);
  for_each_strip<A, kWidest<Target>>(
      rows, rows.logits_strides, row_begin, row_end, [&](auto wide, int64_t row, int count) {
        constexpr int W = wide.value;
        const StripLogits<T, Target, W> logits(rows, row, count);
        const Strip<A, P, W> grad(rows, static_cast<P*>(call.grad), call.grad_strides, row, count);
        const auto max = PerRow<A, W>::of(statistics.max + row, count);
        const GradOutputs<A, W> upstream(call, row, count);
        auto log_sum = PerRow<A, W>::of(statistics.sum + row, count);
        for (int w = 0; w < W; ++w) log_sum.set(w, math::log(log_sum.lanes(w)));
        for_each_block(rows.classes, [&](int64_t k, int classes) {
          Block<A, W> block;
          logits.read(k, classes, block);
          for (int c = 0; c < classes; ++c) {
            const V class_weight = broadcast(weight == nullptr ? A(1) : weight[k + c]);
            for (int w = 0; w < W; ++w) {
              V& x = block.values[c][w];
              x = target_gradient(x, smoothing, upstream.g.lanes(w), class_weight, max.lanes(w), log_sum.lanes(w));
            }
          }
          grad.write(k, classes, block);
        });
      });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::across
