// The CPU's part of every op (ops.h).
#pragma once

#include "../host/binary_divergence.h"
#include "../host/divergence.h"
#include "../host/sigmoid_bce.h"
#include "../host/softmax_ce.h"

namespace torchce::cpu {

struct Backend {
  struct Scope {
    explicit Scope(const host::Tensor&) {}
  };

  static void run(const Scope&, const host::softmax_ce::ForwardCall& call);
  static void run(const Scope&, const host::softmax_ce::BackwardCall& call);
  static void run(const Scope&, const host::softmax_ce::ForwardBackwardCall& call);
  static void run(const Scope&, const host::sigmoid_bce::ForwardCall& call);
  static void run(const Scope&, const host::sigmoid_bce::BackwardCall& call);
  static void run(const Scope&, const host::binary_divergence::ForwardCall& call);
  static void run(const Scope&, const host::binary_divergence::BackwardCall& call);
  static void run(const Scope&, const host::divergence::ForwardCall& call);
  static void run(const Scope&, const host::divergence::BackwardCall& call);
};

}  // namespace torchce::cpu
