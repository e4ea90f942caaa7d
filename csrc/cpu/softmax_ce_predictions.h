// The predictions of rows: of each the first class of its largest logit. The forward has found that logit, and its
// class is looked for right after, while the logits are in cache.
#pragma once

#include "softmax_ce_kernels.h"

namespace torchce::cpu::TORCHCE_LEVEL {

// Whether the forward has left the rows' largest logits in its statistics: there may be values of logits instead, of
// which several can be equal where the logits are not.
inline bool knows_largest(const Rows& rows) { return !rows.are_transformed(); }

// The class torch.argmax gives of a row with a NaN or +inf, whose largest logit the forward has not kept: that of the
// first NaN, else the first of the largest logit.
inline int64_t class_of_largest(const Rows& rows, RowPosition at) {
  const int64_t first = at.offset(rows.logits_strides);
  double largest = -math::kInfinity<double>;
  int64_t found = 0;
  for (int64_t k = 0; k < rows.classes && largest == largest; ++k) {
    const auto x = load_as<double>(rows.dtype, rows.logits, first + k * rows.logits_strides.classes);
    if (x <= largest) continue;
    largest = x;
    found = k;
  }
  return found;
}

namespace along {

// The first class whose logit is `largest`, which one of them is.
template <class T>
TORCHCE_SIMD int64_t first_class_of(const RowLogits<T, Indices>& x, int64_t classes, Accumulate<T> largest) {
  constexpr int64_t P = VectorPair<T>::kSize;
  const auto wanted = broadcast(largest);
  const auto is_among = [&](int64_t k, int pairs) TORCHCE_HD_LAMBDA {
    auto hits = wanted != wanted;
    for (int i = 0; i < pairs; ++i) {
      const auto pair = x.at(k + i * P);
      hits |= (pair.v[0] == wanted) | (pair.v[1] == wanted);
    }
    return fold<math::ElementOf<decltype(hits)>>(hits, [](auto a, auto b) { return a | b; }) != 0;
  };
  constexpr int kPairs = 16;  // at a time: to see whether it is among them takes as long as some pairs
  int64_t k = 0;
  while (k + kPairs * P <= classes && !is_among(k, kPairs)) k += kPairs * P;
  while (k + P <= classes && !is_among(k, 1)) k += P;
  while (k < classes - 1 && !(x.logit.value(load_one<Accumulate<T>>(x.x + k)) == largest)) ++k;
  return k;
}

template <class T>
void predict(const Forward& call, int64_t row_begin, int64_t row_end) {
  constexpr int64_t P = VectorPair<T>::kSize;
  const Rows& rows = call.rows;
  const Statistics<Accumulate<T>> statistics(rows, call.statistics);
  for_each_row<T, Indices>(
      rows, row_begin, int(row_end - row_begin), [&](int l, RowPosition at, RowLogits<T, Indices> x) TORCHCE_HD_LAMBDA {
        auto largest = statistics.max[row_begin + l];
        if (!knows_largest(rows) && largest == largest) {
          Largest<T> of_row(x.x);
          for (int64_t k = 0; k + P <= rows.classes; k += P) of_row.add(x.x + k);
          of_row.add(x.x + rows.classes - P);
          largest = max_of<Accumulate<T>>(of_row.lanes());
        }
        call.predictions[row_begin + l] =
            largest == largest ? first_class_of(x, rows.classes, largest) : class_of_largest(rows, at);
      });
}

}  // namespace along

namespace across {

template <class T, int W>
TORCHCE_SIMD void predict_strip(const Forward& call, int64_t row, int count) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  constexpr int L = kLanes<A>;
  const Rows& rows = call.rows;
  const StripLogits<T, Indices, W> logits(rows, row, count);
  auto largest = PerRow<A, W>::of(static_cast<const A*>(call.statistics) + row, count);
  if (!knows_largest(rows)) {
    PerRow<A, W> of_logits;
    for (int w = 0; w < W; ++w) of_logits.set(w, broadcast(-math::kInfinity<A>));
    for_each_block(rows.classes, [&](int64_t k, int classes) {
      Block<A, W> block;
      logits.read(k, classes, block);
      for (int w = 0; w < W; ++w) {
        for (int c = 0; c < classes; ++c) {
          of_logits.set(w, larger_or_second(of_logits.lanes(w), block.values[c][w]));
        }
      }
    });
    for (int w = 0; w < W; ++w) {  // a NaN of the statistics stays
      largest.set(w, math::select(largest.lanes(w) == largest.lanes(w), of_logits.lanes(w), largest.lanes(w)));
    }
  }
  int64_t found[W * L];
  for (int64_t& k : found) k = -1;
  for_each_block(rows.classes, [&](int64_t k, int classes) {
    Block<A, W> block;
    logits.read(k, classes, block);
    for (int w = 0; w < W; ++w) {
      V place = broadcast(A(classes));  // the first in the block
      for (int c = classes - 1; c >= 0; --c) {
        place = math::select(block.values[c][w] == largest.lanes(w), broadcast(A(c)), place);
      }
      for (int l = 0; l < L; ++l) {
        if (found[w * L + l] < 0 && place[l] < A(classes)) found[w * L + l] = k + int64_t(place[l]);
      }
    }
  });
  RowPosition at(rows, row);
  for (int l = 0; l < count; ++l, at.advance(rows)) {
    call.predictions[row + l] = found[l] < 0 ? class_of_largest(rows, at) : found[l];
  }
}

template <class T>
void predict(const Forward& call, int64_t row_begin, int64_t row_end) {
  for_each_strip<Accumulate<T>, kWidest<Indices>>(
      call.rows, call.rows.logits_strides, row_begin, row_end,
      [&](auto wide, int64_t row, int count) { predict_strip<T, wide.value>(call, row, count); });
}

}  // namespace across

inline void softmax_ce_predict(const Forward& call, int64_t row_begin, int64_t row_end) {
  with_float_type(call.rows.dtype, [&](auto logits) {
    using T = decltype(logits);
    if (lanes_run_along<T, Indices>(call.rows)) {
      along::predict<T>(call, row_begin, row_end);
    } else {
      across::predict<T>(call, row_begin, row_end);
    }
  });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL
