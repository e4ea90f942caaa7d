// The classes of two distributions as the divergence kernels read them, and what each adds to the sums of its row.
#pragma once

#include "../math/divergence.h"
#include "../row_position.h"
#include "exp.cuh"
#include "pack.cuh"
#include "packed_classes.cuh"
#include "reduce.cuh"

namespace torchce::cuda::divergence {

using namespace torchce::divergence;

// Which operands a call has, at compile time.
template <Side kFirstSide, Side kOtherSide, bool kIsJs>
struct Sides {
  static constexpr Side kFirst = kFirstSide, kOther = kOtherSide;
  static constexpr bool kJs = kIsJs;
};

// Where the statistics of row r lie.
template <class A>
struct Statistics {
  A *first_max = nullptr, *first_sum, *other_max = nullptr, *other_sum = nullptr, *value, *second_value;

  __device__ __forceinline__ Statistics(const Rows& rows, const void* data, int64_t r) {
    const int64_t count = rows.outer * rows.inner;
    A* next = static_cast<A*>(const_cast<void*>(data)) + r;
    const auto take = [&] {
      A* mine = next;
      next += count;
      return mine;
    };
    if (rows.first.side == Side::logits) first_max = take();
    first_sum = take();
    if (rows.other.side == Side::logits) {
      other_max = take();
      other_sum = take();
    }
    value = take();
    second_value = next;
  }
};

__device__ __forceinline__ bool is_kept(const Rows& rows, RowPosition at) {
  return rows.mask == nullptr || rows.mask[at.offset(rows.mask_strides)] != 0;
}

// The value of a class as the formulas take it: logits are divided by the temperature, whose inverse is `scale`.
template <Side kSide, class A>
__device__ __forceinline__ A scaled(A x, A scale) {
  return kSide == Side::logits ? math::rounded_product(x, scale) : x;
}

// Calls add(class, values of the first operand, of the other one), packs of them, for the classes of thread `thread`
// out of `team` that share a row. kAdjacent: classes are adjacent in memory. The first operand decides where packs
// start.
template <class S, bool kAdjacent, class T, class Add>
__device__ __forceinline__ void for_each_class(const Rows& rows, RowPosition at, int thread, int team, Add add) {
  using A = Accumulate<T>;
  constexpr bool kHasOther = S::kOther != Side::none;
  const A scale = A(1 / rows.options.temperature);
  const T* f = static_cast<const T*>(rows.first.data) + at.offset(rows.first.strides);
  const T* o = kHasOther ? static_cast<const T*>(rows.other.data) + at.offset(rows.other.strides) : f;
  const int64_t f_step = rows.first.strides.classes, o_step = rows.other.strides.classes;
  const auto add_one = [&](int64_t k) {
    A first[1] = {scaled<S::kFirst>(A(load_one<A>(f + k * f_step)), scale)}, other[1] = {0};
    if constexpr (kHasOther) other[0] = scaled<S::kOther>(A(load_one<A>(o + k * o_step)), scale);
    add(k, first, other);
  };
  if constexpr (!kAdjacent) {
    for (int64_t k = thread; k < rows.classes; k += team) add_one(k);
  } else {
    constexpr int V = kPack<T>;
    const PackedClasses<V> classes(f, 0, rows.classes);
    const bool other_aligned = is_aligned<V>(o + classes.body);
    classes.for_each_before(thread, team, add_one);
    for (int64_t p = thread; p < classes.packs; p += team) {
      const int64_t k = classes.body + p * V;
      const Pack<T, V> first_pack = load_pack<V>(f + k, true);
      Pack<T, V> other_pack = first_pack;
      if constexpr (kHasOther) other_pack = load_pack<V>(o + k, other_aligned);
      A first[V], other[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        first[v] = scaled<S::kFirst>(get<A>(first_pack, v), scale);
        other[v] = kHasOther ? scaled<S::kOther>(get<A>(other_pack, v), scale) : A(0);
      }
      add(k, first, other);
    }
    classes.for_each_after(thread, team, add_one);
  }
}

// The sums of some of a row's classes, which are against the largest logits among them.
template <class A, class S>
struct Share {
  A first_max, other_max, first, other, surplus, gaps, most;
  Offsets<A> offsets;

  static constexpr A kLeast = sizeof(A) == sizeof(double) ? A(-__DBL_MAX__) : A(-__FLT_MAX__);

  // Of probabilities the reference is 0, of logits finite even where all are minus infinity.
  __device__ __forceinline__ static Share identity() {
    return {S::kFirst == Side::logits ? kLeast : A(0),
            S::kOther == Side::logits ? kLeast : A(0),
            0,
            0,
            0,
            0,
            -math::kInfinity<A>,
            {0, 0}};
  }

  // Makes the sums relative to other references, which are not less.
  __device__ __forceinline__ void raise_to(A new_first, A new_other) {
    const auto next = Offsets<A>::template near<A>(new_first, new_other);
    if (first != 0) gaps += (offsets.sum() - next.sum()) * first;
    offsets = next;
    if constexpr (S::kFirst == Side::logits) {
      const A factor = math::exp_of_negative(first_max - new_first);
      first *= factor;
      gaps = factor == 0 ? A(0) : gaps * factor;
      first_max = new_first;
    }
    if constexpr (S::kOther == Side::logits) {
      other *= math::exp_of_negative(other_max - new_other);
      other_max = new_other;
    }
  }

  // What `width` neighbouring lanes have together, with the same bits in each of them.
  __device__ __forceinline__ Share of_lanes(int width) const {
    A largest_first = first_max, largest_other = other_max, largest_gap = most;
    for (int step = width / 2; step > 0; step /= 2) {
      largest_first = math::larger(largest_first, __shfl_xor_sync(kAllLanes, largest_first, step));
      largest_other = math::larger(largest_other, __shfl_xor_sync(kAllLanes, largest_other, step));
      largest_gap = math::larger(largest_gap, __shfl_xor_sync(kAllLanes, largest_gap, step));
    }
    Share all = *this;
    all.raise_to(largest_first, largest_other);
    all.first = sum_of_lanes(all.first, width);
    all.other = sum_of_lanes(all.other, width);
    all.gaps = sum_of_lanes(all.gaps, width);
    all.most = largest_gap;
    return all;
  }

  // The sums as KL divergences take them.
  __device__ __forceinline__ RowSums<A> sums() const {
    return {first_max, other_max, first, other, gaps, most, offsets};
  }
};

// Adds up the classes that a thread goes through. They stay relative to earlier maxima until a logit is far above: the
// errors of the factors would add up.
template <class A, class S>
class RunningShare {
  static constexpr int kFar = 4;
  Share<A, S> against_ = Share<A, S>::identity();  // references and offsets; its sums are those below
  A first_max_ = against_.first_max, other_max_ = against_.other_max;
  math::CompensatedSum<A, true> first_{0, 0}, other_{0, 0}, gaps_{0, 0};
  Bounds<A> bounds_;

  __device__ __forceinline__ void rebase(A new_first, A new_other) {
    const auto next = Offsets<A>::template near<A>(new_first, new_other);
    if (first_.sum != 0) gaps_.add((against_.offsets.sum() - next.sum()) * first_.sum);
    against_.offsets = next;
    if constexpr (S::kFirst == Side::logits) {
      const A factor = math::exp_of_negative(against_.first_max - new_first);
      first_.scale(factor);
      if (factor == 0) {
        gaps_ = {0, 0};
      } else {
        gaps_.scale(factor);
      }
      against_.first_max = new_first;
    }
    if constexpr (S::kOther == Side::logits) {
      other_.scale(math::exp_of_negative(against_.other_max - new_other));
      against_.other_max = new_other;
    }
  }

 public:
  template <int n>
  __device__ __forceinline__ void add(const A (&f)[n], const A (&o)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if constexpr (S::kFirst == Side::logits) first_max_ = math::larger(first_max_, f[i]);
      if constexpr (S::kOther == Side::logits) other_max_ = math::larger(other_max_, o[i]);
    }
    const bool first_is_far = first_max_ > against_.first_max + A(kFar);
    const bool other_is_far = other_max_ > against_.other_max + A(kFar);
    if (first_is_far || other_is_far) {
      rebase(first_is_far ? first_max_ : against_.first_max, other_is_far ? other_max_ : against_.other_max);
    }
    const auto terms = math::sum_in_pairs<n>(0, [&](int i) {
      KLTerms<A> of_class;
      A value = f[i], other_value = 0;
      of_class.first = value;
      if constexpr (S::kFirst == Side::logits) {
        of_class.first = exp_in_sum(value - against_.first_max);
      } else if constexpr (!S::kJs) {
        value = math::log_of_positive(value);
      }
      if constexpr (S::kOther == Side::logits) {
        other_value = o[i];
        of_class.other = exp_in_sum(other_value - against_.other_max);
      } else if constexpr (S::kOther == Side::probabilities) {
        of_class.other = o[i];
        other_value = math::log_of_positive(o[i]);
      }
      if constexpr (!S::kJs) {
        const A gap = against_.offsets.gap(value, other_value);
        against_.most = math::larger(against_.most, gap);
        of_class.gaps = of_class.first * bounds_.within(gap);
      }
      return of_class;
    });
    first_.add(terms.first);
    other_.add(terms.other);
    gaps_.add(terms.gaps);
  }

  // What was added, against the largest logits.
  __device__ __forceinline__ Share<A, S> share() {
    rebase(first_max_, other_max_);
    Share<A, S> result = against_;
    result.first = first_.sum;
    result.other = other_.sum;
    result.gaps = gaps_.sum;
    return result;
  }
};

// What makes probabilities of the values of a row, times `factor`.
template <class A, Side kSide>
struct Softmax {
  ScaledExp<A, false> exp;
  A max;

  __device__ __forceinline__ Softmax(A max, A sum, A factor) : exp(factor / sum), max(max) {}
  __device__ __forceinline__ A at(A x) const { return exp(x - max); }
};
template <class A>
struct Softmax<A, Side::probabilities> {
  A factor;

  __device__ __forceinline__ Softmax(A, A, A factor) : factor(factor) {}
  __device__ __forceinline__ A at(A probability) const { return factor * probability; }
};
template <class A>
struct Softmax<A, Side::none> {
  __device__ __forceinline__ Softmax(A, A, A) {}
  __device__ __forceinline__ A at(A) const { return 0; }
};

}  // namespace torchce::cuda::divergence
