// What the logits of rows add up to, with lanes along each row.
//
// A row is read from memory once. Its exponentials are summed against the largest logit of its first pair, until one
// turns up that is much larger, which is looked at once a block: then the sum shrinks (Milakov and Gimelshein 2018,
// arXiv:1805.02867) and the block is taken again. Short rows, which stay in cache, are summed against their own
// largest.
#pragma once

#include <type_traits>

#include "softmax_ce_per_row.h"

namespace torchce::cpu::TORCHCE_LEVEL::along {

constexpr int kGroup = 4;  // vectors of rows whose sums are folded together
constexpr int64_t kGroupRows = kGroup * kLanes<float>;

// The coefficients u_k of a pair of classes. Weights: VectorPair<T>, or One. kEven: as of a Coefficient.
template <class T, class Weights, bool kEven>
struct PairCoefficients {
  using V = Lanes<Accumulate<T>>;
  Weights weights;
  VectorPair<T> shares;

  TORCHCE_SIMD auto operator[](int j) const {
    if constexpr (math::kIsOne<Weights>) {
      return Coefficient<math::One, V, kEven>{{}, shares.v[j]};
    } else {
      return Coefficient<V, V, kEven>{weights.v[j], shares.v[j]};
    }
  }
  // The same, 0 in the places before `place`.
  TORCHCE_SIMD PairCoefficients<T, Weights, false> from(int64_t place) const {
    PairCoefficients<T, Weights, false> result{weights, shares.from(place, 0)};
    if constexpr (!math::kIsOne<Weights>) result.weights = weights.from(place, 0);  // infinity times 0 would be NaN
    return result;
  }
};

// The coefficients of a row. kWeighted: there are class weights.
template <class T, class Target, bool kWeighted>
struct RowCoefficients {
  using A = Accumulate<T>;
  static constexpr bool kEven = !Target::kProbabilities;
  static constexpr bool kConstant = kEven && !kWeighted;  // all are the same
  const A* weight;
  const void* target;
  Smoothing<A> smoothing;

  TORCHCE_SIMD RowCoefficients(const Rows& rows, RowPosition at)
      : weight(static_cast<const A*>(rows.weight)), target(nullptr), smoothing(smoothing_of<A>(rows)) {
    if constexpr (Target::kProbabilities) {
      target = static_cast<const typename Target::Storage*>(rows.target) + at.offset(rows.target_strides);
    }
  }

  // Reads the coefficients of the pair of vectors that begins at class k.
  TORCHCE_SIMD auto at(int64_t k) const {
    if constexpr (kWeighted) {
      return PairCoefficients<T, VectorPair<T>, kEven>{VectorPair<T>::load(weight + k), shares(k)};
    } else {
      return PairCoefficients<T, math::One, kEven>{{}, shares(k)};
    }
  }
  // The sum of the coefficients of so many pairs, lane by lane, where all are the same.
  TORCHCE_SIMD Lanes<A> sum_of_pairs(int pairs) const { return broadcast(A(2 * pairs) * smoothing.even_share()); }

 private:
  TORCHCE_SIMD VectorPair<T> shares(int64_t k) const {
    if constexpr (Target::kProbabilities) {
      auto shares = VectorPair<T>::load(static_cast<const typename Target::Storage*>(target) + k);
      if (smoothing.label_smoothing != 0) {
        for (auto& share : shares.v) share = smoothing.share(share);
      }
      return shares;
    } else {
      const auto share = broadcast(smoothing.even_share());
      return {share, share};
    }
  }
};

// Calls f(RowCoefficients).
template <class T, class Target, class F>
TORCHCE_SIMD void with_coefficients(const Rows& rows, RowPosition at, F f) {
  if constexpr (Target::kSpread) {
    if (rows.weight != nullptr) return f(RowCoefficients<T, Target, true>(rows, at));
  }
  f(RowCoefficients<T, Target, false>(rows, at));
}

// The logits of a row, read for the pair of vectors that begins at class k.
template <class T, class Target>
struct RowLogits {
  using A = Accumulate<T>;
  const T* x;  // as they lie in memory
  [[no_unique_address]] LogitOf<Target, T> logit;

  RowLogits(const Rows& rows, RowPosition at)
      : x(static_cast<const T*>(rows.logits) + at.offset(rows.logits_strides)), logit(rows) {}

  TORCHCE_SIMD VectorPair<T> at(int64_t k) const {
    VectorPair<T> values = VectorPair<T>::load(x + k);
    for (auto& v : values.v) v = logit.value(v);
    return values;
  }
  // The largest values, lane by lane, of what was added to `largest` as it lies in memory.
  TORCHCE_SIMD Lanes<A> largest_values(const Largest<T>& largest) const { return logit.value(largest.lanes()); }
};

// What pairs of classes add up to. Exponentials and gaps of first and second vectors are added up apart: they are
// products, with which an addition to a sum is fused, but not one to another product.
template <class Sums>
struct SumsOfPairs {
  Sums of_first, of_second;

  TORCHCE_SIMD SumsOfPairs operator+(const SumsOfPairs& other) const {
    return {of_first + other.of_first, of_second + other.of_second};
  }
  TORCHCE_SIMD Sums value() const { return of_first + of_second; }
};

// What the pair of classes from k on adds up to; kFromBegin: without those before `begin`.
template <class Target, bool kFromBegin = false, class T, class Coefficients, class V>
TORCHCE_SIMD auto sums_of_pair(const math::ExpInSum<V>& exp, VectorPair<T> pair, const Coefficients& u, int64_t k,
                               V from, int64_t begin = 0) {
  if constexpr (kFromBegin) pair = pair.from(begin - k, -math::kInfinity<Accumulate<T>>);
  const V first = exp(pair.v[0] - from), second = exp(pair.v[1] - from);
  const auto sums = [&](auto known, auto of_pair) TORCHCE_HD_LAMBDA {
    using Sums = LogitSums<Target::kSpread, V, decltype(known)::value>;
    return SumsOfPairs<Sums>{Sums::of(first, of_pair[0], pair.v[0], from),
                             Sums::of(second, of_pair[1], pair.v[1], from)};
  };
  if constexpr (kFromBegin) {
    return sums(std::false_type{}, u.at(k).from(begin - k));
  } else {
    return sums(std::bool_constant<Coefficients::kConstant>{}, u.at(k));
  }
}

// The sums of a group's rows, each still spread over the lanes of a vector, to be folded together.
template <class Target, class A>
struct LaneSums {
  using V = Lanes<A>;
  static constexpr int L = kLanes<A>, kRows = kGroup * L, kSpreadRows = Target::kSpread ? kRows : 1;
  V max[kRows], exponentials[kRows];
  V coefficients[kSpreadRows], gaps[kSpreadRows];

  TORCHCE_SIMD void set(int l, const LogitSums<Target::kSpread, V>& sums) {
    exponentials[l] = sums.exponentials;
    if constexpr (Target::kSpread) {
      coefficients[l] = sums.coefficients;
      gaps[l] = sums.gaps;
    }
  }
  // Gives row l, which is ignored or does not exist, harmless sums.
  TORCHCE_SIMD void leave_out(int l) {
    max[l] = V{};
    set(l, {broadcast(A(1) / L)});
  }

  TORCHCE_SIMD void fold_max(PerRow<A, kGroup>& folded, int vectors) const {
    fold(folded, max, vectors, [](auto a, auto b) { return larger_or_second(a, b); });
  }
  TORCHCE_SIMD void fold_sums(SumsPerRow<Target, A, kGroup>& folded, int vectors) const {
    const auto add = [](auto a, auto b) { return a + b; };
    fold(folded.exponentials, exponentials, vectors, add);
    if constexpr (Target::kSpread) {
      fold(folded.coefficients, coefficients, vectors, add);
      fold(folded.gaps, gaps, vectors, add);
    }
  }

 private:
  template <class F>
  TORCHCE_SIMD static void fold(PerRow<A, kGroup>& folded, const V (&lanes)[kRows], int vectors, F combine) {
    for (int w = 0; w < vectors; ++w) folded.set(w, fold_each(reinterpret_cast<const V(&)[L]>(lanes[w * L]), combine));
  }
};

// Adds up one row of logits.
template <class T, class Target, class Coefficients>
class RowSums {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  static constexpr int kPairs = 16;  // of a block
  static constexpr int kAsCounted = 0, kRemainder = -1;
  // A logit may exceed the reference by this much. Their difference is rounded by up to 2^-22, and so are the
  // exponential and, beside the loss, the gap: the largest terms must not be far from the reference.
  static constexpr A kHeadroom = 8;

  math::ExpInSum<V> exp;
  A reference;  // what exponentials and gaps are against
  Largest<T> largest;
  CompensatedLogitSums<Target::kSpread, V> total{};

  // Adds a block of pairs from class k on: as many as the template says, or `count` (kAsCounted), or one whose classes
  // before `begin` were in the pair before (kRemainder).
  template <int kCount>
  TORCHCE_SIMD void add(const RowLogits<T, Target>& x, const Coefficients& u, int64_t k, int count, int64_t begin = 0) {
    constexpr int64_t P = VectorPair<T>::kSize;
    if constexpr (kCount > 0) count = kCount;
    for (;;) {
      const V from = broadcast(reference);
      Largest<T> largest_here = largest;
      const auto sums_of = [&](int i) TORCHCE_HD_LAMBDA {
        largest_here.add(x.x + k + i * P);
        return sums_of_pair<Target, kCount == kRemainder>(exp, x.at(k + i * P), u, k + i * P, from, begin);
      };
      LogitSums<Target::kSpread, V> sums;
      if constexpr (kCount == kRemainder) {
        sums = sums_of(0).value();
      } else {
        math::StridedSum<2, decltype(sums_of(0))> of_block;
        bool values_first = false;
        if constexpr (kCount > 0 && !LogitOf<Target, T>::kIsPlain) values_first = x.logit.is_capped;
        if (values_first) {
          // All values come before the first exponential: a tanh with an exponential behind it is a chain of operations
          // so long that few of them are under way at once.
          VectorPair<T> values[kCount > 0 ? kCount : 1];
          for (int i = 0; i < kCount; ++i) {
            largest_here.add(x.x + k + i * P);
            values[i] = x.at(k + i * P);
          }
          of_block.add(kCount, [&](int i) TORCHCE_HD_LAMBDA {
            return sums_of_pair<Target>(exp, values[i], u, k + i * P, from);
          });
        } else {
          of_block.add(count, sums_of);
        }
        sums = of_block.value().value().complete(u.sum_of_pairs(count));
      }
      const A max = max_of<A>(x.largest_values(largest_here));
      if (!(max > reference + kHeadroom)) {
        largest = largest_here;
        total.add(sums);
        return;
      }
      raise_to(max);
    }
  }

  TORCHCE_SIMD void raise_to(A logit) {
    total.rebase(broadcast(reference), broadcast(logit), exp(broadcast(reference - logit)));
    reference = logit;
  }

 public:
  TORCHCE_SIMD RowSums(const RowLogits<T, Target>& x, int64_t classes, const Coefficients& u) : largest(x.x) {
    constexpr int64_t P = VectorPair<T>::kSize;
    // The first pair may be of -inf, and the next one not.
    reference = larger_or_second(kLowest<A>, max_of<A>(x.largest_values(largest)));
    int64_t k = 0;
    for (; k + kPairs * P <= classes; k += kPairs * P) add<kPairs>(x, u, k, kPairs);
    const int left = int((classes - k) / P);
    add<kAsCounted>(x, u, k, left);
    k += left * P;
    if (k < classes) add<kRemainder>(x, u, classes - P, 1, k);
  }

  TORCHCE_SIMD void write(const RowLogits<T, Target>& x, int l, LaneSums<Target, A>& lane_sums,
                          PerRow<A, kGroup>& references) const {
    references[l] = reference;
    lane_sums.max[l] = x.largest_values(largest);
    lane_sums.set(l, {total.exponentials.sum, total.coefficients.sum, total.gaps.sum});
  }
};

// Rows of a few pairs are gone through twice: first for the largest logits, which are folded for many rows at once,
// then for the sums against them. A row by itself takes as long for its folds as for some pairs. With 16 pairs the
// second look takes longer than that, with 9 as long (Zen 4, AVX-512).
template <class T>
constexpr int64_t kShortRow = 8 * VectorPair<T>::kSize;

template <class T, class Target>
TORCHCE_SIMD Lanes<Accumulate<T>> largest_of_short_row(const RowLogits<T, Target>& x, int64_t classes) {
  constexpr int64_t P = VectorPair<T>::kSize;
  Largest<T> largest(x.x);
  for (int64_t k = P; k + P <= classes; k += P) largest.add(x.x + k);
  if (classes % P != 0) largest.add(x.x + classes - P);
  return x.largest_values(largest);
}

template <class T, class Target, class Coefficients>
TORCHCE_SIMD auto sums_of_short_row(const RowLogits<T, Target>& x, int64_t classes, const Coefficients& u,
                                    Lanes<Accumulate<T>> from) {
  constexpr int64_t P = VectorPair<T>::kSize;
  const math::ExpInSum<Lanes<Accumulate<T>>> exp;
  auto of_pairs = sums_of_pair<Target>(exp, x.at(0), u, 0, from);
  int64_t k = P;
  for (; k + P <= classes; k += P) of_pairs = of_pairs + sums_of_pair<Target>(exp, x.at(k), u, k, from);
  const auto sums = of_pairs.value().complete(u.sum_of_pairs(int(k / P)));
  if (k == classes) return sums;
  return sums + sums_of_pair<Target, true>(exp, x.at(classes - P), u, classes - P, from, k).value();
}

// The sum of term(k), the terms of the pair of vectors that begins at class k, over the classes of a row.
template <class T, class Term>
TORCHCE_SIMD Accumulate<T> sum_over_pairs(int64_t classes, const Term& term) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  constexpr int64_t P = VectorPair<T>::kSize;
  constexpr int kPairs = 16;  // of a block
  math::CompensatedSum<V, true> total{};
  int64_t k = 0;
  for (; k + P <= classes; k += kPairs * P) {
    const int64_t left = (classes - k) / P;
    math::StridedSum<2, V> of_block;
    of_block.add(int(left < kPairs ? left : kPairs), [&](int i) TORCHCE_HD_LAMBDA { return term(k + i * P).sum(); });
    total.add(of_block.value());
  }
  const int64_t done = classes / P * P;
  if (done < classes) total.add(term(classes - P).from(done - (classes - P), A(0)).sum());
  return sum_of<A>(total.sum);
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::along
