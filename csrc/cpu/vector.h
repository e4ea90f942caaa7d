// Short vectors of the accumulation type, as wide as the registers of the SIMD level being compiled.
//
// Included by kernels that are compiled once a level (levels.h); everything with a linker symbol lives in that level's
// namespace. The vectors are GNU vector extensions: the compiler of any architecture turns them into its instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../storage.h"
#include "levels.h"

namespace torchce::cpu::TORCHCE_LEVEL {

constexpr int kBytes = TORCHCE_LEVEL_BYTES;

typedef float Floats __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef int64_t Longs __attribute__((vector_size(kBytes)));

template <class Element, int count>
struct VectorOf {
  typedef Element type __attribute__((vector_size(count * sizeof(Element))));
};
template <class A>
struct LanesOf;
template <>
struct LanesOf<float> {
  using V = Floats;
};
template <>
struct LanesOf<double> {
  using V = Doubles;
};
template <class A>
using Lanes = typename LanesOf<A>::V;
template <class A>
constexpr int kLanes = kBytes / int(sizeof(A));

#define TORCHCE_SIMD inline __attribute__((always_inline))

// The number that an element is in memory, of types that the compiler has vectors of.
template <class T>
struct NumberOf {
  using type = T;
};
template <>
struct NumberOf<FloatInDouble> {
  using type = float;
};

// `load` and `store` move kLanes<A> consecutive elements to and from a vector.

template <class A, class T>
TORCHCE_SIMD Lanes<A> load(const T* p) {
  if constexpr (kSixteenBits<T> && sizeof(A) == sizeof(double)) {
    Lanes<A> v{};  // a float64 problem with 16-bit gradients: rare enough to go lane by lane
    for (int l = 0; l < kLanes<A>; ++l) v[l] = load_one<A>(p + l);
    return v;
  } else if constexpr (kSixteenBits<T>) {
    typedef uint16_t Bits __attribute__((vector_size(kBytes / 2)));
    Bits bits;
    std::memcpy(&bits, p, sizeof bits);
    return math::from_bits(widen_bits(T{}, __builtin_convertvector(bits, Ints)));
  } else {
    typedef typename NumberOf<T>::type Stored __attribute__((vector_size(sizeof(T) * kLanes<A>)));
    Stored stored;
    std::memcpy(&stored, p, sizeof stored);
    if constexpr (sizeof(T) == 1) {  // by doubling: GCC takes a longer step lane by lane
      const auto doubled = __builtin_convertvector(stored, typename VectorOf<uint16_t, kLanes<A>>::type);
      const auto wide = __builtin_convertvector(doubled, typename VectorOf<int32_t, kLanes<A>>::type);
      return __builtin_convertvector(wide, Lanes<A>);
    } else {
      return __builtin_convertvector(stored, Lanes<A>);
    }
  }
}

template <Nans kNans = Nans::any, class T, class V>
TORCHCE_SIMD void store(T* p, V value) {
  if constexpr (kSixteenBits<T> && sizeof(value[0]) == sizeof(double)) {
    for (int l = 0; l < kLanes<double>; ++l) store_one(p + l, value[l]);
  } else if constexpr (kSixteenBits<T>) {
    typedef uint16_t Bits __attribute__((vector_size(kBytes / 2)));
    const Bits bits = __builtin_convertvector(narrow_bits<kNans>(T{}, math::to_bits(value)), Bits);
    std::memcpy(p, &bits, sizeof bits);
  } else {
    constexpr int kElements = sizeof(V) / sizeof(value[0]);
    typedef typename NumberOf<T>::type Stored __attribute__((vector_size(sizeof(T) * kElements)));
    const Stored stored = __builtin_convertvector(value, Stored);
    std::memcpy(p, &stored, sizeof stored);
  }
}

template <class A>
TORCHCE_SIMD Lanes<A> broadcast(A value) {
  return value - Lanes<A>{};  // which, unlike a sum with 0, the compiler knows to be `value`, -0 included
}

// The vector (0, 1, 2, ...).
template <class A>
TORCHCE_SIMD Lanes<A> lane_numbers() {
  Lanes<A> v;
  for (int l = 0; l < kLanes<A>; ++l) v[l] = A(l);
  return v;
}

// Two vectors of neighbouring elements of storage type T. Other types lie one vector after the other; of 16-bit types
// the elements at even places are in the first vector and those at odd ones in the second, which is a shift and a mask
// away from how they lie in memory, where any other order takes instructions that move data across lanes.
template <class T>
struct VectorPair {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  static constexpr int kVectors = 2;
  static constexpr int kSize = kVectors * kLanes<A>;
  static constexpr int kStep = kSixteenBits<T> ? 2 : 1;  // between neighbouring lanes, in elements

  V v[kVectors];

  // Place of the first lane of a vector within the pair.
  static constexpr int start(int vector) { return kSixteenBits<T> ? vector : vector * kLanes<A>; }

  // Loads p[0] ... p[kSize - 1], elements of T or of another type, in T's order.
  template <class P>
  TORCHCE_SIMD static VectorPair load(const P* p) {
    if constexpr (!kSixteenBits<T>) {
      return {cpu::TORCHCE_LEVEL::load<A>(p), cpu::TORCHCE_LEVEL::load<A>(p + kLanes<A>)};
    } else if constexpr (kSixteenBits<P>) {
      Words words;
      std::memcpy(&words, p, sizeof words);
      return {math::from_bits(widen_lower_bits(P{}, words)), math::from_bits(widen_upper_bits(P{}, words))};
    } else {
      VectorPair pair{};
      for (int l = 0; l < kLanes<A>; ++l) {
        pair.v[0][l] = load_one<A>(p + 2 * l);
        pair.v[1][l] = load_one<A>(p + 2 * l + 1);
      }
      return pair;
    }
  }

  template <Nans kNans = Nans::any, class P>
  TORCHCE_SIMD void store(P* p) const {
    if constexpr (!kSixteenBits<T>) {
      cpu::TORCHCE_LEVEL::store(p, v[0]);
      cpu::TORCHCE_LEVEL::store(p + kLanes<A>, v[1]);
    } else {
      const Words low = Words(narrow_bits<kNans>(T{}, math::to_bits(v[0]))),
                  high = Words(narrow_bits<kNans>(T{}, math::to_bits(v[1])));
      const Words words = (low & 0xffff) | (high << 16);
      std::memcpy(p, &words, sizeof words);
    }
  }

  // The two vectors added to each other.
  TORCHCE_SIMD V sum() const { return v[0] + v[1]; }

  // This pair with 0 in that place.
  TORCHCE_SIMD VectorPair without(int64_t place) const {
    VectorPair result;
    for (int i = 0; i < kVectors; ++i) {
      const V places = lane_numbers<A>() * A(kStep) + A(start(i));
      result.v[i] = math::select(places == A(place), V{}, v[i]);
    }
    return result;
  }

  // This pair with `v` in the places before `place`.
  TORCHCE_SIMD VectorPair from(int64_t place, A filler) const {
    VectorPair result;
    for (int i = 0; i < kVectors; ++i) {
      const V places = lane_numbers<A>() * A(kStep) + A(start(i));
      result.v[i] = math::select(places >= A(place), v[i], broadcast(filler));
    }
    return result;
  }
};
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "VectorPair takes the lower half of a word for the even element");

// The larger of a and b; b where either is a NaN.
template <class V>
TORCHCE_SIMD V larger_or_second(V a, V b) {
  return a > b ? a : b;
}

using math::kLowest;

// Lanes of two vectors: lane I of `a` and then `b` for each I.
template <size_t... I, class V>
TORCHCE_SIMD V shuffle(V a, V b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else  // GCC has the function above since version 12 only
  return __builtin_shuffle(a, b, decltype(a < b){I...});
#endif
}

template <size_t distance, class V, size_t... I>
TORCHCE_SIMD V swap_lanes(V v, std::index_sequence<I...>) {
  return shuffle(v, v, std::index_sequence<(I ^ distance)...>());
}

// Folds the upper half of the lanes onto the lower until one is left, so that the order is fixed and short.
template <class A, size_t lanes = 0, class V, class F>
TORCHCE_SIMD A fold(V v, F combine) {
  constexpr size_t kAll = sizeof(V) / sizeof(A), kHalf = (lanes == 0 ? kAll : lanes) / 2;
  v = combine(v, swap_lanes<kHalf>(v, std::make_index_sequence<kAll>()));
  if constexpr (kHalf > 1) {
    return fold<A, kHalf>(v, combine);
  } else {
    return v[0];
  }
}
template <class A>
TORCHCE_SIMD A sum_of(Lanes<A> v) {
  return fold<A>(v, [](auto a, auto b) { return a + b; });
}
template <class A>
TORCHCE_SIMD A max_of(Lanes<A> v) {
  return fold<A>(v, [](auto a, auto b) { return larger_or_second(a, b); });
}

// The largest of pairs, lane by lane; NaNs may not count.
template <class T>
class Largest {
  using V = Lanes<Accumulate<T>>;
  V largest;

  TORCHCE_SIMD static V of(const T* p) {
    const auto x = VectorPair<T>::load(p);
    return larger_or_second(x.v[0], x.v[1]);
  }

 public:
  TORCHCE_SIMD explicit Largest(const T* first) : largest(of(first)) {}
  TORCHCE_SIMD void add(const T* p) { largest = larger_or_second(largest, of(p)); }
  TORCHCE_SIMD V lanes() const { return largest; }
};

// The largest of 16-bit floats is found without widening them: it is the largest of integers if it has no sign, else
// the smallest of integers without one.
template <class T>
  requires kSixteenBits<T>
class Largest<T> {
  typedef int16_t Shorts __attribute__((vector_size(kBytes)));
  typedef uint16_t Magnitudes __attribute__((vector_size(kBytes)));
  Shorts most;
  Magnitudes least;

  TORCHCE_SIMD static Shorts load(const T* p) {
    Shorts x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }

 public:
  TORCHCE_SIMD explicit Largest(const T* first) : most(load(first)), least(Magnitudes(most)) {}
  TORCHCE_SIMD void add(const T* p) {
    const Shorts x = load(p);
    const Magnitudes m = Magnitudes(x);
    most = x > most ? x : most;
    least = m < least ? m : least;
  }
  TORCHCE_SIMD Floats lanes() const {
    const Shorts bits = most >= 0 ? most : Shorts(least);
    T stored[VectorPair<T>::kSize];
    std::memcpy(stored, &bits, sizeof stored);
    const auto x = VectorPair<T>::load(stored);
    return larger_or_second(x.v[0], x.v[1]);
  }
};

// A sum of vectors in double, over all lanes.
template <class A>
struct SumInDouble {
  Doubles sum{};
  TORCHCE_SIMD void add(Lanes<A> v) {
    if constexpr (sizeof(A) == sizeof(double)) {
      sum += v;
    } else {
      typedef A Half __attribute__((vector_size(kBytes / 2)));
      Half halves[2];
      std::memcpy(halves, &v, sizeof v);
      sum += __builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles);
    }
  }
  TORCHCE_SIMD double value() const { return sum_of<double>(sum); }
};

// Lanes of the lower (or upper) halves of two vectors, in turn.
template <bool kUpper, class V, size_t... I>
TORCHCE_SIMD V interleave(V a, V b, std::index_sequence<I...>) {
  constexpr size_t L = sizeof...(I);
  return shuffle(a, b, std::index_sequence<(I / 2 + I % 2 * L + (kUpper ? L / 2 : 0))...>());
}

// Each vector's fold, in the lane of its number; the same number as `fold` gives. Two vectors are folded by half at
// once: the lower halves of both are interleaved and so are the upper ones.
template <int first = 0, int step = 1, class V, class F, int lanes>
TORCHCE_SIMD V fold_each(const V (&vectors)[lanes], F combine) {
  if constexpr (step == lanes) {
    return vectors[first];
  } else {
    const V a = fold_each<first, 2 * step>(vectors, combine), b = fold_each<first + step, 2 * step>(vectors, combine);
    const auto numbers = std::make_index_sequence<lanes>();
    return combine(interleave<false>(a, b, numbers), interleave<true>(a, b, numbers));
  }
}

// Swaps rows and columns of a square of lanes. A vector and its partner half the square away are interleaved; that
// rotates the bits of an element's place (row, column) by one, and after as many rounds as a row number has bits, row
// and column have changed places.
template <class A>
TORCHCE_SIMD void transpose(Lanes<A> (&square)[kLanes<A>]) {
  constexpr int L = kLanes<A>;
  const auto lanes = std::make_index_sequence<L>();
  for (int round = 1; round < L; round *= 2) {
    Lanes<A> next[L];
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<false>(square[i], square[i + L / 2], lanes);
      next[2 * i + 1] = interleave<true>(square[i], square[i + L / 2], lanes);
    }
    for (int i = 0; i < L; ++i) square[i] = next[i];
  }
}

}  // namespace torchce::cpu::TORCHCE_LEVEL
