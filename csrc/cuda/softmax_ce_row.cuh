// What the softmax_ce kernels do with a row: its packs of classes, its target, the end of its loss, its gradient.
#pragma once

#include "pack.cuh"
#include "softmax_ce_sums.cuh"

namespace torchce::cuda::softmax_ce {

using namespace torchce::softmax_ce;

// Blocks of a kernel that must fit on a multiprocessor at once. Three only where nothing else needs the registers: the
// exponentials of float64, and the coefficients of every class.
template <class Target, class T>
constexpr int kBlocks = sizeof(T) == sizeof(double) || Target::kSpread ? kBlocksToFit : kBlocksOfPlain;

// Packs of logits a thread has in flight. Half as many where something else needs the registers: the exponentials of
// float64, and the coefficients of every class.
template <class Target, class A>
constexpr int kUnroll = 4 / (sizeof(A) == sizeof(double) ? 2 : 1) / (Target::kSpread ? 2 : 1);

// Classes [begin, end) of a row, in packs of V that start where the logits are aligned, and singly before and after.
//
// Bulk and remainder: for C = 1001 bfloat16 and a row that starts 2 bytes after such a place, 7 single classes,
// 124 packs of 8, 2 single classes.
template <int V>
struct PackedClasses {
  int64_t begin, end;
  int64_t body;  // the first class in a pack
  int64_t packs;

  template <class T>
  __device__ __forceinline__ PackedClasses(const T* x, int64_t begin, int64_t end) : begin(begin), end(end) {
    const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(x + begin) % (V * sizeof(T)) / sizeof(T));
    body = begin + (misaligned == 0 ? 0 : V - misaligned);
    if (body > end) body = end;
    packs = (end - body) / V;
  }

  // Calls f(class) for the single classes of thread `thread` out of `threads`, of those before the packs or after them.
  template <class F>
  __device__ __forceinline__ void for_each_before(int thread, int threads, F f) const {
#pragma unroll 1
    for (int64_t k = begin + thread; k < body; k += threads) f(k);
  }
  template <class F>
  __device__ __forceinline__ void for_each_after(int thread, int threads, F f) const {
#pragma unroll 1
    for (int64_t k = body + packs * V + thread; k < end; k += threads) f(k);
  }
};

// u_k of one row.
template <class Target, class A>
struct Coefficients {
  static constexpr bool kUsed = Target::kSpread;
  const A* weight;
  A label_smoothing, classes;

  __device__ __forceinline__ explicit Coefficients(const Rows& rows)
      : weight(static_cast<const A*>(rows.weight)),
        label_smoothing(A(rows.label_smoothing)),
        classes(A(rows.classes)) {}

  __device__ __forceinline__ A weight_of(int64_t k) const { return weight == nullptr ? A(1) : weight[k]; }

  // `probability` is the target's, where it has one.
  __device__ __forceinline__ A at(int64_t k, A probability) const {
    if constexpr (Target::kProbabilities) {
      return probability_coefficient(probability, weight_of(k), label_smoothing, classes);
    } else {
      return weight_of(k);
    }
  }
};

// The element type of probabilities; of logits where there are none, so that a pointer has a type.
template <class Target, class T>
struct ProbabilityType {
  using type = T;
};
template <class P, class T>
struct ProbabilityType<Probabilities<P>, T> {
  using type = P;
};

template <class T>
__device__ __forceinline__ const T* at_row(const void* data, const RowStrides& strides, RowPosition at) {
  return static_cast<const T*>(data) + at.offset(strides);
}

// The bits of n elements of `bytes` bytes each, from number `first` on, `step` apart. Nothing waits for them before a
// number is made of them. Their width is asked once for all: loads on both sides of a branch would wait for each other.
template <int n>
__device__ __forceinline__ void load_bits(const void* data, int bytes, int64_t first, int64_t step,
                                          uint64_t (&bits)[n]) {
  const auto load = [&](auto storage) {
#pragma unroll
    for (int v = 0; v < n; ++v) bits[v] = static_cast<const decltype(storage)*>(data)[first + v * step];
  };
  if (bytes == 8) {
    load(uint64_t{});
  } else if (bytes == 4) {
    load(uint32_t{});
  } else if (bytes == 2) {
    load(uint16_t{});
  } else {
    load(uint8_t{});
  }
}
template <class A>
__device__ __forceinline__ A float_of(DType dtype, uint64_t bits) {
  A value{};
  with_float_type(dtype, [&](auto element) {
    std::memcpy(&element, &bits, sizeof element);
    value = A(load_one<A>(&element));
  });
  return value;
}

// The targets of n neighbouring rows.
template <class Target, int n>
__device__ __forceinline__ void load_target_bits(const Rows& rows, RowPosition at, uint64_t (&bits)[n]) {
  if constexpr (Target::kProbabilities) {
#pragma unroll
    for (int v = 0; v < n; ++v) bits[v] = 0;
  } else {
    load_bits(rows.target, bytes_of(rows.target_dtype), at.offset(rows.target_strides), rows.target_strides.inner,
              bits);
  }
}
template <class Target>
__device__ __forceinline__ uint64_t load_target_bits(const Rows& rows, RowPosition at) {
  uint64_t bits[1];
  load_target_bits<Target>(rows, at, bits);
  return bits[0];
}
__device__ __forceinline__ int64_t target_of(const Rows& rows, uint64_t bits) {
  return rows.target_dtype == DType::int32 ? int64_t(int32_t(uint32_t(bits))) : int64_t(bits);
}

// Rows that need no pass over their classes.
template <class Target>
__device__ __forceinline__ bool is_ignored(const Rows& rows, int64_t target) {
  return !Target::kProbabilities && target == rows.ignore_index;
}

// The target of the row whose turn it is, of the rows that a thread goes through. It is asked for while the row before
// is worked on: whether a row is ignored must be known before its logits are asked for, which would wait for it
// otherwise.
template <class Target>
class TargetAhead {
  const Rows& rows_;
  const int64_t count_;
  uint64_t bits_;

 public:
  __device__ __forceinline__ TargetAhead(const Rows& rows, int64_t first)
      : rows_(rows), count_(rows.outer * rows.inner) {
    ask_for(first);
  }
  __device__ __forceinline__ void ask_for(int64_t r) {
    bits_ = r < count_ ? load_target_bits<Target>(rows_, RowPosition(rows_, r)) : 0;
  }
  __device__ __forceinline__ int64_t get() const { return target_of(rows_, bits_); }
};

// The logit at a row's target, asked for before the row's sums and looked at after them, and before a gradient is
// written there. Class 0's where the target is no class.
template <class T, class Target>
__device__ __forceinline__ T load_hot_logit(const Rows& rows, RowPosition at, int64_t target) {
  if constexpr (Target::kProbabilities) return T{};
  const int64_t index = TargetClass(rows, target).index;
  return at_row<T>(rows.logits, rows.logits_strides, at)[index * rows.logits_strides.classes];
}

// A row's end: writes its statistics and its unreduced loss, and adds to what the thread has of the reduced one. A row
// whose index is no class has a NaN loss.
template <class T, class Target, class A>
__device__ __forceinline__ void finish_row(const Forward& call, int64_t r, const RowSums<A, Target::kSpread>& sums,
                                           int64_t target, T hot_logit, Sums& total) {
  const Rows& rows = call.rows;
  const Statistics<A> statistics(rows, call.statistics);
  const A sum = sums.whole_exponentials(), log_sum = math::log(sum);
  A loss = 0;
  if constexpr (Target::kProbabilities) {
    loss = spread_loss(A(1), sums.coefficients, sums.gaps, log_sum, A(rows.classes));
    statistics.spread[r] = sums.coefficients;
  } else {
    const IndexedRow<A> row(rows, target);
    if (row.kind == RowKind::bad) {
      loss = A(__builtin_nan(""));
    } else if (row.kind == RowKind::kept) {
      loss = hot_loss(row.hot, load_one<A>(&hot_logit), sums.max, log_sum);
      if constexpr (Target::kSpread) {
        loss += spread_loss(row.uniform, sums.coefficients, sums.gaps, log_sum, A(rows.classes));
      }
      total.weight += row.weight;
    }
  }
  statistics.max[r] = sums.max;
  statistics.sum[r] = sum;
  total.loss += loss;
  if (rows.reduction == Reduction::none) store_as(call.loss_dtype, call.loss, r, loss);
}

// The launch's end: the reduced loss and the totals, from the sums that thread 0 of one block has.
// Assumes: all threads of that block call it.
template <class Target, class A, int kThreads>
__device__ __forceinline__ void finish_launch(const Forward& call, const Sums& total) {
  const Rows& rows = call.rows;
  Sums classes{0, double(rows.classes)};  // the sum of the class weights, which only smoothed indices ask for later
  if (!Target::kProbabilities && Target::kSpread && rows.weight != nullptr) {
    classes = Sums::identity();
    for (int64_t k = threadIdx.x; k < rows.classes; k += kThreads) {
      classes.weight += static_cast<const A*>(rows.weight)[k];
    }
    classes = reduce_block<kThreads>(classes);
  }
  if (threadIdx.x != 0) return;
  const double divisor = Target::kProbabilities ? double(rows.outer) * double(rows.inner) : total.weight;
  static_cast<A*>(call.totals)[0] = A(divisor);
  static_cast<A*>(call.totals)[1] = A(classes.weight);
  if (rows.reduction == Reduction::none) return;
  store_as(call.loss_dtype, call.loss, 0, rows.reduction == Reduction::mean ? total.loss / divisor : total.loss);
}

// Which gradient a backward computes.
enum class Of { logits, target };

// Of a gradient: the logits' type, or the target's for the gradient of the target.
template <class Target, class T, Of of>
struct GradientType {
  using type = T;
};
template <class P, class T>
struct GradientType<Probabilities<P>, T, Of::target> {
  using type = P;
};

// What the upstream gradient, the forward's statistics and the target say of a row: all that is read of it beside its
// logits.
template <class A>
struct RowInputs {
  uint64_t grad_output_bits;
  A divisor;  // of a mean
  uint64_t target_bits;
  A max, sum, coefficients;  // the last one is sum_k u_k, where the target has any
};

// The upstream gradients of n neighbouring rows.
template <int n>
__device__ __forceinline__ void load_grad_output_bits(const Backward& call, RowPosition at, uint64_t (&bits)[n]) {
  const bool each = call.rows.reduction == Reduction::none;
  load_bits(call.grad_output, bytes_of(call.grad_output_dtype), each ? at.offset(call.grad_output_strides) : 0,
            each ? call.grad_output_strides.inner : 0, bits);
}

// The inputs of n neighbouring rows from row r on, in loads of which none waits for another.
template <class Target, Of of, int n, class A>
__device__ __forceinline__ void load_row_inputs(const Backward& call, int64_t r, RowPosition at,
                                                RowInputs<A> (&inputs)[n]) {
  const Rows& rows = call.rows;
  const Statistics<A> statistics(rows, call.statistics);
  uint64_t targets[n], grad_outputs[n];
  load_target_bits<Target>(rows, at, targets);
  load_grad_output_bits(call, at, grad_outputs);
  const A divisor = static_cast<const A*>(call.totals)[0];
  A coefficients_of_all = 0;
  if constexpr (!Target::kProbabilities && Target::kSpread) coefficients_of_all = sum_of_class_weights<A>(call);
#pragma unroll
  for (int v = 0; v < n; ++v) {
    inputs[v] = {grad_outputs[v],    divisor, targets[v], statistics.max[r + v], statistics.sum[r + v],
                 coefficients_of_all};
    if constexpr (Target::kProbabilities && of == Of::logits) inputs[v].coefficients = statistics.spread[r + v];
  }
}

// A row's gradient, given its logits. T: their type.
template <class T, class Target, Of of>
struct RowGradient {
  using A = Accumulate<T>;
  static constexpr bool kShort = kSixteenBits<typename GradientType<Target, T, of>::type>;
  ScaledExp<A, kShort> probability;
  A max;
  A scale;        // of the target's gradient: the upstream gradient
  A spread;       // of the target's gradient: log sum
  A hot;          // subtracted at the target class
  int64_t index;  // the target class, or -1
  bool ignored;

  __device__ __forceinline__ RowGradient() {}
  __device__ __forceinline__ RowGradient(const Backward& call, const RowInputs<A>& in)
      : max(in.max), scale(0), spread(0), hot(0), index(-1), ignored(false) {
    const Rows& rows = call.rows;
    A g = float_of<A>(call.grad_output_dtype, in.grad_output_bits);
    if (rows.reduction == Reduction::mean) g /= in.divisor;
    if constexpr (of == Of::target) {
      scale = g;
      spread = math::log(in.sum);
    } else if constexpr (Target::kProbabilities) {
      probability = ScaledExp<A, kShort>(g * in.coefficients / in.sum);
      spread = g;
    } else {
      const IndexedRow<A> row(rows, target_of(rows, in.target_bits));
      ignored = row.kind == RowKind::ignored;
      index = row.index;
      const A kept = row.kind == RowKind::bad ? A(__builtin_nan("")) : g;
      hot = kept * row.hot;
      A sum_of_coefficients = hot;
      if constexpr (Target::kSpread) {
        spread = kept * row.uniform;
        sum_of_coefficients += spread * in.coefficients;
      }
      probability = ScaledExp<A, kShort>(sum_of_coefficients / in.sum);
    }
  }

  // Of class k, all but the part that only the target class has.
  __device__ __forceinline__ A at(int64_t k, A x, A target, const Coefficients<Target, A>& coefficients) const {
    if constexpr (of == Of::target) {
      return scale * target_gradient(x, coefficients.weight_of(k), max, spread, coefficients.label_smoothing);
    } else {
      A g = probability(x - max);
      if constexpr (Target::kSpread) g -= spread * coefficients.at(k, target);
      return g;
    }
  }

  // The target class's own part, where it is one of the V classes from k on: asked once for all of them.
  template <int V>
  __device__ __forceinline__ void subtract_hot(A (&gradient)[V], int64_t k) const {
    if constexpr (!Target::kProbabilities) {
      const uint64_t place = uint64_t(index - k);
      if (place >= uint64_t(V)) return;
#pragma unroll
      for (int v = 0; v < V; ++v) gradient[v] -= v == int(place) ? hot : A(0);
    }
  }
};

}  // namespace torchce::cuda::softmax_ce
