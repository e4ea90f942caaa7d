// The gradients of divergences, of both operands at once where both are wanted.
#pragma once

#include "divergence_forward.h"

namespace torchce::cpu::TORCHCE_LEVEL::divergences {

// What the gradients of rows are made of, a lane a row. Of rows that are left out the upstream gradient is 0.
template <class A, int W, class S>
struct GradientInputs {
  using V = Lanes<A>;
  PerRow<A, W> kept, upstream, first_max, first_sum, other_max, other_sum, value, second_value;

  TORCHCE_SIMD GradientInputs(const Backward& call, int64_t row, int count)
      : kept(kept_rows<A, W>(call.rows, row, count)),
        upstream{},
        first_max{},
        other_max{},
        other_sum{},
        second_value{} {
    const Rows& rows = call.rows;
    const Statistics<A> statistics(rows, call.statistics);
    RowPosition at(rows, row);
    if (rows.options.reduction == Reduction::none) {
      for (int l = 0; l < count; ++l, at.advance(rows)) upstream[l] = kept[l] == 0 ? A(0) : upstream_of<A>(call, at);
    } else {  // one for all: to make it for each row takes as long as 19 classes do
      const auto of_all = broadcast(upstream_of<A>(call, at));
      for (int w = 0; w < W; ++w) upstream.set(w, math::select(kept.lanes(w) == V{}, V{}, of_all));
    }
    const auto read = [&](const A* p) { return PerRow<A, W>::of(p + row, count); };
    first_sum = read(statistics.first_sum);
    if constexpr (S::kFirst == Side::logits) first_max = read(statistics.first_max);
    if constexpr (S::kOther == Side::logits) {
      other_max = read(statistics.other_max);
      other_sum = read(statistics.other_sum);
    }
    value = read(statistics.value);
    if constexpr (S::kJs) second_value = read(statistics.second_value);
  }

  // Those of vector w, or of row l in every lane.
  TORCHCE_SIMD RowInputs<Lanes<A>> lanes(int w) const {
    return {upstream.lanes(w),  first_max.lanes(w), first_sum.lanes(w),   other_max.lanes(w),
            other_sum.lanes(w), value.lanes(w),     second_value.lanes(w)};
  }
  TORCHCE_SIMD RowInputs<Lanes<A>> row(int l) const {
    return {broadcast(upstream[l]),  broadcast(first_max[l]), broadcast(first_sum[l]),   broadcast(other_max[l]),
            broadcast(other_sum[l]), broadcast(value[l]),     broadcast(second_value[l])};
  }
};

// The gradients of W vectors of rows.
template <class A, class S>
using GradientsOf = RowGradients<Lanes<A>, A, S, Softmax<A, S::kFirst>, Softmax<A, S::kOther>>;

// Writes the gradients of all classes, zeros for rows that are not in `kept`, which is null where all are.
template <bool kOfFirst, bool kOfOther, class A, int W, class S, class First, class Other, class FirstSink,
          class OtherSink>
TORCHCE_SIMD void write_gradients(const Rows& rows, const First& first, const Other& other, int64_t steps,
                                  const GradientsOf<A, S> (&gradients)[W], const PerRow<A, W>* kept,
                                  const FirstSink& first_sink, const OtherSink& other_sink) {
  using V = Lanes<A>;
  for_each_pair_of_blocks<S, A, W>(first, other, scale_of<A>(rows.options), steps,
                                   [&](int64_t k, int count, Block<A, W>& f, Block<A, W>& o) TORCHCE_HD_LAMBDA {
                                     for (int w = 0; w < W; ++w) {
                                       for (int c = 0; c < count; ++c) {
                                         V of_first = f.values[c][w],
                                           of_other = S::kOther == Side::none ? V{} : o.values[c][w];
                                         gradients[w].template turn<kOfFirst, kOfOther>(of_first, of_other);
                                         if constexpr (kOfFirst) f.values[c][w] = of_first;
                                         if constexpr (kOfOther) o.values[c][w] = of_other;
                                       }
                                       if (kept == nullptr) continue;
                                       const auto left_out = kept->lanes(w) == V{};
                                       for (int c = 0; c < count; ++c) {
                                         if constexpr (kOfFirst)
                                           f.values[c][w] = math::select(left_out, V{}, f.values[c][w]);
                                         if constexpr (kOfOther)
                                           o.values[c][w] = math::select(left_out, V{}, o.values[c][w]);
                                       }
                                     }
                                     first_sink.write(k, count, f);
                                     other_sink.write(k, count, o);
                                   });
}

// Calls f with two constants that say which of both gradients are wanted.
template <class S, class F>
TORCHCE_SIMD void with_wanted(const Backward& call, F f) {
  const bool first = call.first.data != nullptr, other = call.other.data != nullptr;
  if constexpr (S::kOther != Side::none) {
    if (first && other) return f(std::true_type{}, std::true_type{});
    if (other) return f(std::false_type{}, std::true_type{});
  }
  if (first) f(std::true_type{}, std::false_type{});
}

// Calls f with where both gradients go, sink(gradient, its operand) of those that are wanted.
template <bool kOfFirst, bool kOfOther, class Sink, class F>
TORCHCE_SIMD void with_sinks(const Backward& call, Sink sink, F f) {
  if constexpr (kOfFirst && kOfOther) {
    f(sink(call.first, call.rows.first), sink(call.other, call.rows.other));
  } else if constexpr (kOfFirst) {
    f(sink(call.first, call.rows.first), NoOperand{});
  } else {
    f(NoOperand{}, sink(call.other, call.rows.other));
  }
}

// The gradients of W vectors of rows, made where they stay: a copy of them takes as long as some classes do.
template <class A, int W, class S>
struct StripGradients {
  const GradientsOf<A, S> of[W];

  TORCHCE_SIMD StripGradients(const Options& options, const GradientInputs<A, W, S>& in, bool of_first)
      : StripGradients(options, in, of_first, std::make_integer_sequence<int, W>()) {}

 private:
  template <int... w>
  TORCHCE_SIMD StripGradients(const Options& options, const GradientInputs<A, W, S>& in, bool of_first,
                              std::integer_sequence<int, w...>)
      : of{GradientsOf<A, S>(options, in.lanes(w), of_first)...} {}
};

template <class A, int W, class S>
void backward_strip(const Backward& call, int64_t row, int count) {
  const Rows& rows = call.rows;
  const GradientInputs<A, W, S> in(call, row, count);
  const StripGradients<A, W, S> gradients(rows.options, in, call.first.data != nullptr);
  const auto sink = [&](const Gradient& of, const Operand& operand) {
    return StripOperand<A, W>(rows, of.data, operand.dtype, of.strides, row, count);
  };
  with_wanted<S>(call, [&](auto of_first, auto of_other) {
    constexpr bool kOfFirst = decltype(of_first)::value, kOfOther = decltype(of_other)::value;
    with_sinks<kOfFirst, kOfOther>(call, sink, [&](const auto& first_sink, const auto& other_sink) {
      with_strip<A, W, S>(rows, row, count, [&](const auto& first, const auto& other) TORCHCE_HD_LAMBDA {
        write_gradients<kOfFirst, kOfOther, A, W, S>(rows, first, other, rows.classes, gradients.of,
                                                     rows.mask == nullptr ? nullptr : &in.kept, first_sink, other_sink);
      });
    });
  });
}

template <class A, class S>
void backward_group(const Backward& call, int64_t row, int count) {
  const Rows& rows = call.rows;
  const int64_t steps = (rows.classes + kLanes<A> - 1) / kLanes<A>;
  const GradientInputs<A, 1, S> in(call, row, count);
  with_wanted<S>(call, [&](auto of_first, auto of_other) {
    constexpr bool kOfFirst = decltype(of_first)::value, kOfOther = decltype(of_other)::value;
    RowPosition at(rows, row);
    const auto sink = [&](const Gradient& of, const Operand& operand) {
      return RowOperand<A>(rows, of.data, operand.dtype, of.strides, at, A(0));
    };
    for (int l = 0; l < count; ++l, at.advance(rows)) {
      with_sinks<kOfFirst, kOfOther>(call, sink, [&](const auto& first_sink, const auto& other_sink) {
        if (in.kept[l] == 0) {
          const Block<A, 1> zeros{};
          across::for_each_block(steps, [&](int64_t k, int count) {
            first_sink.write(k, count, zeros);
            other_sink.write(k, count, zeros);
          });
          return;
        }
        const GradientsOf<A, S> gradients[1] = {GradientsOf<A, S>(rows.options, in.row(l), kOfFirst)};
        with_row<A, S>(rows, at, [&](const auto& first, const auto& other) TORCHCE_HD_LAMBDA {
          write_gradients<kOfFirst, kOfOther, A, 1, S>(rows, first, other, steps, gradients, nullptr, first_sink,
                                                       other_sink);
        });
      });
    }
  });
}

// Whether lanes run along each row of the gradients too.
template <class A>
bool gradients_run_along(const Backward& call) {
  const auto is_adjacent = [](const Gradient& of) { return of.data == nullptr || of.strides.classes == 1; };
  return lanes_run_along<A>(call.rows) && is_adjacent(call.first) && is_adjacent(call.other);
}

template <class A, class S>
void backward(const Backward& call, int64_t row_begin, int64_t row_end) {
  const Rows& rows = call.rows;
  if (gradients_run_along<A>(call)) {
    for (int64_t row = row_begin; row < row_end; row += kLanes<A>) {
      backward_group<A, S>(call, row, int(std::min<int64_t>(row_end - row, kLanes<A>)));
    }
    return;
  }
  across::for_each_strip<A, kWidest>(
      rows, rows.first.strides, row_begin, row_end,
      [&](auto wide, int64_t row, int count) { backward_strip<A, wide.value, S>(call, row, count); });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::divergences
