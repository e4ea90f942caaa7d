// A fiber: a stack of its own and where it stopped on it. All fibers of one launch run on the thread that launched.
#pragma once

#include <cstddef>

// swapcontext saves the signal mask, which is a system call and costs far more than the switch itself; where it is
// known how, fibers switch by a few instructions of their own.
#if defined(__x86_64__) && !defined(CUDA_EMULATION_UCONTEXT)
#define CUDA_EMULATION_X86_64 1
#else
#include <ucontext.h>
#endif

namespace cuda_emulation {

class Fiber {
 public:
  Fiber() = default;  // the calling thread itself, once it switches away
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Forgets whatever its stack holds; the next switch_to this fiber calls `entry`, which must never return.
  void prepare(void (*entry)());

  // Stops the running fiber, which must be this one, and goes on with `next`. Returns when something switches back.
  void switch_to(Fiber& next);

 private:
  static constexpr size_t kStackSize = 128 << 10;

  static void start();
  void arrive();

#if defined(CUDA_EMULATION_X86_64)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  void (*entry_)() = nullptr;
  std::byte* stack_ = nullptr;    // kept until the process ends
  const void* bottom_ = nullptr;  // of the stack, own or the calling thread's, as AddressSanitizer wants to know it
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace cuda_emulation
