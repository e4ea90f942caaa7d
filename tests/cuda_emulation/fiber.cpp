#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

// AddressSanitizer's, in a process that has it: it must know which stack is in use. This file need not be compiled with
// it, and had better not be, for speed.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* begin, size_t size);
}

#if defined(CUDA_EMULATION_X86_64)
// Saves what the ABI lets a caller expect unchanged, stores the stack pointer to *from and loads `to`. It jumps where
// it would return, since the processor's prediction of returns is always wrong across stacks.
extern "C" __attribute__((visibility("hidden"))) void cuda_emulation_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .p2align 4
  .hidden cuda_emulation_switch
  .globl cuda_emulation_switch
  .type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
  .size cuda_emulation_switch, . - cuda_emulation_switch
  .popsection
)");
#endif

namespace cuda_emulation {
namespace {

Fiber* running = nullptr;   // only to tell a fiber that starts who it is
Fiber* previous = nullptr;  // whom the running fiber came from

// A page below it cannot be touched, so that an overflow is a fault.
std::byte* new_stack(size_t size) {
  const size_t guard = sysconf(_SC_PAGESIZE);
  void* memory =
      mmap(nullptr, guard + size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<std::byte*>(memory) + guard;
}

}  // namespace

void Fiber::prepare(void (*entry)()) {
  if (stack_ == nullptr) stack_ = new_stack(kStackSize);
  bottom_ = stack_;
  size_ = kStackSize;
  entry_ = entry;
  fake_stack_ = nullptr;
  // A fiber that was abandoned left its frames' redzones.
  if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(stack_, kStackSize);
#if defined(CUDA_EMULATION_X86_64)
  constexpr int kSaved = 6;
  // Neighbouring stacks begin at different cache lines: at one offset within every page they would all fall into the
  // same few sets of the first-level cache.
  const uintptr_t number = reinterpret_cast<uintptr_t>(stack_) / kStackSize;
  auto top = reinterpret_cast<uintptr_t*>(stack_ + kStackSize - number % 32 * 128);
  *--top = 0;  // where a return address would be: aligns the stack as after a call, and ends backtraces
  *--top = reinterpret_cast<uintptr_t>(&Fiber::start);
  for (int i = 0; i < kSaved; ++i) *--top = 0;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackSize;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::start, 0);
#endif
}

void Fiber::switch_to(Fiber& next) {
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.size_);
  }
  previous = this;
  running = &next;
#if defined(CUDA_EMULATION_X86_64)
  cuda_emulation_switch(&stack_pointer_, next.stack_pointer_);
#else
  swapcontext(&context_, &next.context_);
#endif
  arrive();
}

void Fiber::start() {
  running->arrive();
  running->entry_();
}

void Fiber::arrive() {
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(fake_stack_, &previous->bottom_, &previous->size_);
  }
}

}  // namespace cuda_emulation
