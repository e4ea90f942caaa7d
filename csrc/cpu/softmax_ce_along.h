// Softmax cross entropy with lanes along each row. Rows have at least one full pair (vector.h) of adjacent classes.
//
// Bulk and remainder: pairs start at 0, P, 2P, ... and the last one at C - P, so it overlaps its neighbour unless P
// divides C (C = 1001, P = 32: it covers 969..1000, of which 969..991 were done before). Sums mask what was done
// before. A gradient that overwrites its logits would transform the overlap twice, so the last pair is read before any
// is written.
#pragma once

#include "softmax_ce_along_sums.h"

namespace torchce::cpu::TORCHCE_LEVEL::along {

// Calls body(first row, rows) for groups.
template <class A, class F>
TORCHCE_SIMD void for_each_group(int64_t row_begin, int64_t row_end, F body) {
  constexpr int kRows = kGroup * kLanes<A>;
  for (int64_t row = row_begin; row < row_end; row += kRows) {
    body(row, int(row_end - row < kRows ? row_end - row : kRows));
  }
}

// Calls body(row of the group, its position, its logits).
template <class T, class Target, class F>
TORCHCE_SIMD void for_each_row(const Rows& rows, int64_t row, int count, F body) {
  RowPosition at(rows, row);
  for (int l = 0; l < count; ++l, at.advance(rows)) {
    body(l, at, RowLogits<T, Target>(rows, at));
  }
}

template <class T>
using IndexTargets = IndexedRows<Accumulate<T>, kGroup>;

// The values of the rows' target classes, from their logits.
template <class T, class Target>
TORCHCE_SIMD void to_values(const Rows& rows, int count, PerRow<Accumulate<T>, kGroup>& logits) {
  const LogitOf<Target, T> logit(rows);
  if constexpr (logit.kIsPlain) return;
  for (int w = 0; w < vectors_of<Accumulate<T>>(count); ++w) logits.set(w, logit.value(logits.lanes(w)));
}

// Losses and statistics of a group. `targets` is null where they are probabilities.
template <class T, class Target>
TORCHCE_SIMD void forward_group(const Forward& call, int64_t row, int count, const IndexTargets<T>* targets,
                                Partial* partial) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const int64_t classes = rows.classes;
  const int vectors = vectors_of<A>(count);
  LaneSums<Target, A> lane_sums;
  SumsPerRow<Target, A, kGroup> sums;
  PerRow<A, kGroup> hot_logits{};
  const auto look_up_target = [&](int l, const RowLogits<T, Target>& x) TORCHCE_HD_LAMBDA {
    if (targets != nullptr) hot_logits[l] = load_one<A>(x.x + targets->index[l]);
  };
  const auto for_each_kept_row = [&](auto body) TORCHCE_HD_LAMBDA {
    for_each_row<T, Target>(rows, row, count, [&](int l, RowPosition at, RowLogits<T, Target> x) TORCHCE_HD_LAMBDA {
      if (targets == nullptr || targets->kept[l] != 0 || rows.every_row) {
        body(l, at, x);
      } else {
        lane_sums.leave_out(l);
      }
    });
  };
  for (int l = count; l < vectors * kLanes<A>; ++l) lane_sums.leave_out(l);
  if (classes <= kShortRow<T>) {
    for_each_kept_row([&](int l, RowPosition, RowLogits<T, Target> x) TORCHCE_HD_LAMBDA {
      look_up_target(l, x);
      lane_sums.max[l] = largest_of_short_row(x, classes);
    });
    lane_sums.fold_max(sums.max, vectors);
    for (int w = 0; w < vectors; ++w) {  // terms of a row of -inf alone are 0, not NaN
      sums.reference.set(w, larger_or_second(sums.max.lanes(w), broadcast(kLowest<A>)));
    }
    sums.against_max = true;
    for_each_kept_row([&](int l, RowPosition at, RowLogits<T, Target> x) TORCHCE_HD_LAMBDA {
      with_coefficients<T, Target>(rows, at, [&](auto coefficients) TORCHCE_HD_LAMBDA {
        lane_sums.set(l, sums_of_short_row(x, classes, coefficients, broadcast(sums.reference[l])));
      });
    });
  } else {
    sums.reference = {};
    for_each_kept_row([&](int l, RowPosition at, RowLogits<T, Target> x) TORCHCE_HD_LAMBDA {
      look_up_target(l, x);
      with_coefficients<T, Target>(rows, at, [&](auto coefficients) TORCHCE_HD_LAMBDA {
        RowSums<T, Target, decltype(coefficients)>(x, classes, coefficients).write(x, l, lane_sums, sums.reference);
      });
    });
    lane_sums.fold_max(sums.max, vectors);
  }
  lane_sums.fold_sums(sums, vectors);
  to_values<T, Target>(rows, count, hot_logits);
  write_losses<Target, A, kGroup>(call, row, count, sums, targets, hot_logits, partial);
}

template <class T, class Target>
void forward(const Forward& original, int64_t row_begin, int64_t row_end, Partial* partial) {
  using A = Accumulate<T>;
  const Forward call = original;  // what is stored might be the original, for all the compiler knows
  for_each_group<A>(row_begin, row_end, [&](int64_t row, int count) TORCHCE_HD_LAMBDA {
    if constexpr (Target::kProbabilities) {
      forward_group<T, Target>(call, row, count, nullptr, partial);
    } else {
      const IndexTargets<T> targets(call.rows, row, count);
      forward_group<T, Target>(call, row, count, &targets, partial);
    }
  });
}

// The gradients of a row's values, without the part that only the target class has.
template <class T, class Target, class Exp, class Coefficients>
struct ValueGradients {
  using V = Lanes<Accumulate<T>>;
  const Exp& scaled_exp;
  const typename Exp::Scale& scale;
  V max, spread;
  const Coefficients& coefficients;

  // exp(x_k - max) scale - spread u_k, of the pair of vectors that begins at class k.
  TORCHCE_SIMD VectorPair<T> at(int64_t k, const VectorPair<T>& values) const {
    VectorPair<T> g = values;
    for (auto& v : g.v) v = scaled_exp(v - max, scale);
    if constexpr (Target::kSpread) {
      const auto u = coefficients.at(k);
      for (int i = 0; i < g.kVectors; ++i) g.v[i] = class_gradient(g.v[i], spread, u[i].of_gradient());
    }
    return g;
  }
};

// Writes the gradients of a row's logits, as far as ValueGradients go.
template <class T, class Target, class Gradients>
TORCHCE_SIMD void row_gradient(const RowLogits<T, Target>& x, T* grad, int64_t classes, const Gradients& of_values) {
  constexpr int64_t P = VectorPair<T>::kSize;
  const auto gradient = [&](int64_t k, const VectorPair<T>& values) TORCHCE_HD_LAMBDA {
    VectorPair<T> g = of_values.at(k, values);
    for (int i = 0; i < g.kVectors; ++i) g.v[i] = x.logit.slope(values.v[i]) * g.v[i];
    return g;
  };
  const bool remainder = classes % P != 0;
  VectorPair<T> last{};
  if (remainder) last = gradient(classes - P, x.at(classes - P));
  int64_t k = 0;
  if constexpr (!LogitOf<Target, T>::kIsPlain) {
    constexpr int kPairs = 16;  // whose values come before their exponentials, as in RowSums
    for (; x.logit.is_capped && k + kPairs * P <= classes; k += kPairs * P) {
      VectorPair<T> values[kPairs];
      for (int i = 0; i < kPairs; ++i) values[i] = x.at(k + i * P);
      for (int i = 0; i < kPairs; ++i) {
        gradient(k + i * P, values[i]).template store<kNans<Target>>(grad + k + i * P);
      }
    }
  }
  for (; k + P <= classes; k += P) gradient(k, x.at(k)).template store<kNans<Target>>(grad + k);
  if (remainder) last.template store<kNans<Target>>(grad + classes - P);
}

// What the rows of a group have for their gradients. Exp: GradientExp or TiltedExp.
template <class T, class Target, class Exp>
struct GroupGradients {
  using A = Accumulate<T>;
  using Scale = typename Exp::Scale;
  const Rows& rows;
  const IndexTargets<T>* targets;
  Factors<A, kGroup, Exp::kTilted> factors;
  Exp scaled_exp;
  Scale scales[kGroup];

  TORCHCE_SIMD GroupGradients(const Backward& call, int64_t row, int count, const IndexTargets<T>* targets)
      : rows(call.rows), targets(targets), factors(call, row, count, targets) {
    for (int w = 0; w < vectors_of<A>(count); ++w) scales[w] = Scale::of(factors, w);
  }
  // The gradients of the values of the target classes, from their logits.
  TORCHCE_SIMD PerRow<A, kGroup> of_target_values(const PerRow<A, kGroup>& hot_logits, int vectors) const {
    const LogitOf<Target, T> logit(rows);
    PerRow<A, kGroup> result;
    for (int w = 0; w < vectors; ++w) {
      const auto x = logit.value(hot_logits.lanes(w)), max = factors.max.lanes(w), scale = factors.scale.lanes(w);
      Lanes<A> p;
      if constexpr (Exp::kTilted) {
        p = scaled_probability(x, max, scale, factors.tilt.lanes(w));
      } else {
        p = scaled_probability(x, max, scale);
      }
      result.set(w, class_gradient(p, factors.spread.lanes(w), targets->weight.lanes(w)) - factors.hot.lanes(w));
    }
    return result;
  }
  // Whether row l has no gradient.
  TORCHCE_SIMD bool is_zero(int l) const { return targets != nullptr && factors.has_gradient[l] == 0; }

  // Calls f with the ValueGradients of row l.
  template <class F>
  TORCHCE_SIMD void with_row(int l, RowPosition at, F f) const {
    const Scale scale(scales[l / kLanes<A>], l % kLanes<A>);
    with_coefficients<T, Target>(rows, at, [&](auto coefficients) TORCHCE_HD_LAMBDA {
      f(ValueGradients<T, Target, Exp, decltype(coefficients)>{scaled_exp, scale, broadcast(factors.max[l]),
                                                               broadcast(factors.spread[l]), coefficients});
    });
  }
};

template <class T, class Target, class Exp>
TORCHCE_SIMD void backward_group(const Backward& call, int64_t row, int count, const IndexTargets<T>* targets) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const GroupGradients<T, Target, Exp> gradients(call, row, count, targets);
  PerRow<A, kGroup> hot_gradients{};
  if (targets != nullptr) {  // before a logit may be overwritten
    for_each_row<T, Target>(rows, row, count, [&](int l, RowPosition, RowLogits<T, Target> x) TORCHCE_HD_LAMBDA {
      hot_gradients[l] = load_one<A>(x.x + targets->index[l]);  // the logit, for now
    });
    const LogitOf<Target, T> logit(rows);
    const int vectors = vectors_of<A>(count);
    const auto of_values = gradients.of_target_values(hot_gradients, vectors);
    for (int w = 0; w < vectors; ++w) {
      hot_gradients.set(w, logit.slope(logit.value(hot_gradients.lanes(w))) * of_values.lanes(w));
    }
  }
  for_each_row<T, Target>(rows, row, count, [&](int l, RowPosition at, RowLogits<T, Target> x) TORCHCE_HD_LAMBDA {
    T* grad = static_cast<T*>(call.grad) + at.offset(call.grad_strides);
    if (gradients.is_zero(l)) {
      std::memset(static_cast<void*>(grad), 0, sizeof(T) * rows.classes);
      return;
    }
    gradients.with_row(l, at, [&](const auto& of_values) TORCHCE_HD_LAMBDA {
      row_gradient<T, Target>(x, grad, rows.classes, of_values);
    });
    if (targets != nullptr) store_one(grad + targets->index[l], hot_gradients[l]);
  });
}

template <class T, class Target, class Exp>
void backward(const Backward& original, int64_t row_begin, int64_t row_end) {
  using A = Accumulate<T>;
  const Backward call = original;  // what is stored might be the original, for all the compiler knows
  for_each_group<A>(row_begin, row_end, [&](int64_t row, int count) TORCHCE_HD_LAMBDA {
    if constexpr (Target::kProbabilities) {
      backward_group<T, Target, Exp>(call, row, count, nullptr);
    } else {
      const IndexTargets<T> targets(call.rows, row, count);
      backward_group<T, Target, Exp>(call, row, count, &targets);
    }
  });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::along
