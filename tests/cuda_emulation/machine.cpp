#include "machine.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

cuda_emulation::Index threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulation {
namespace {

// The block of thread-local variables that one of them, of a library's shared variables, lies in.
struct SharedMemory {
  explicit SharedMemory(const unsigned char* one_of_them) : one_of_them(one_of_them) {
    dl_iterate_phdr(&SharedMemory::examine, this);
    if (begin == nullptr) throw std::logic_error("CUDA emulation: found no thread-local storage");
  }

  void poison() const { std::memset(begin, 0xff, size); }

  static int examine(dl_phdr_info* info, size_t, void* self) {
    auto& found = *static_cast<SharedMemory*>(self);
    const auto block = static_cast<unsigned char*>(info->dlpi_tls_data);
    for (int i = 0; block != nullptr && i < info->dlpi_phnum; ++i) {
      const size_t size = info->dlpi_phdr[i].p_memsz;
      if (info->dlpi_phdr[i].p_type != PT_TLS || found.one_of_them < block || found.one_of_them >= block + size)
        continue;
      found.begin = block;
      found.size = size;
    }
    return found.begin != nullptr;
  }

  const unsigned char* one_of_them;
  unsigned char* begin = nullptr;
  size_t size = 0;
};

// xorshift64: a few instructions, since every switch takes a draw.
class Random {
 public:
  explicit Random(uint64_t seed) : state_((seed + 1) * 0x9e3779b97f4a7c15) { draw(), draw(); }

  uint64_t draw() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ >> 8;
  }

 private:
  uint64_t state_;
};

struct Arrival {
  unsigned mask;
  Operation operation;
  int source;
  uint64_t value;
  uint64_t result;
  Site site;
};

// Sets of lanes; a lane that exists, is in none of them and is not running waits at the block's barrier.
struct Warp {
  unsigned runnable, waiting, ended;
  Arrival arrivals[kWarpSize];
};

class Machine {
 public:
  void launch(const Launch& launch);
  void block_barrier(Site site);
  uint64_t warp_operation(Operation operation, unsigned mask, uint64_t value, int source, Site site);
  void preemption_point();
  unsigned lane() const { return running_ % kWarpSize; }
  void seed(uint64_t seed) { random_ = Random(seed_ = seed); }

  uint64_t launches = 0, switches = 0;
  std::set<const void*> kernels;  // launched so far

 private:
  static void fiber_main();
  void grow(unsigned threads);
  void run_block(unsigned block);
  void check_dynamic_shared_memory() const;
  bool choose(unsigned* thread);
  void resume(Fiber& from, unsigned thread);
  void stop(Fiber& from);
  void make_runnable(unsigned warp, unsigned lanes);
  void release_barrier();
  bool complete(Warp& warp, unsigned mask);
  void report(const std::string& what);
  [[noreturn]] void abandon();
  void fail_unless_done();
  std::string describe_threads() const;
  std::string describe(unsigned thread) const;
  std::string place() const;

  std::mutex mutex_;  // one launch at a time
  uint64_t seed_ = 0;
  Random random_{0};

  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber host_;

  Launch launch_{};
  Warp warps_[kMaxThreads / kWarpSize];
  unsigned runnable_warps_ = 0;  // those with a runnable lane
  unsigned running_ = 0;
  unsigned live_ = 0;        // threads that have not ended
  unsigned at_barrier_ = 0;  // threads that wait in __syncthreads
  Site barrier_site_;
  unsigned block_warps_ = 0;
  unsigned favoured_warp_ = 0;
  uint64_t whim_ = 0;
  std::string error_;
};

Machine& machine() {
  static Machine machine;
  return machine;
}

bool is_shuffle(Operation operation) { return Operation::shfl <= operation && operation <= Operation::shfl_up; }

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::syncwarp:
      return "__syncwarp";
    case Operation::shfl:
      return "__shfl_sync";
    case Operation::shfl_xor:
      return "__shfl_xor_sync";
    case Operation::shfl_down:
      return "__shfl_down_sync";
    case Operation::shfl_up:
      return "__shfl_up_sync";
    case Operation::ballot:
      return "__ballot_sync";
    case Operation::any:
      return "__any_sync";
    case Operation::all:
      return "__all_sync";
  }
  return "?";
}

std::string name_of(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

std::string hex(unsigned value) {
  std::ostringstream out;
  out << "0x" << std::hex << value;
  return out.str();
}

std::string name_of_kernel(const void* kernel) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) {
    std::ostringstream out;  // of internal linkage; addr2line knows it
    out << "at +0x" << std::hex << static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase);
    return out.str();
  }
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  return name;
}

// --- blocks ---------------------------------------------------------------------------------------------------------

void Machine::launch(const Launch& launch) {
  const std::lock_guard lock(mutex_);
  ++launches;
  kernels.insert(launch.kernel);
  launch_ = launch;
  const unsigned blocks = launch.blocks, threads = launch.threads;
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  grow(threads);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned i = blocks; i-- > 1;) std::swap(order[i], order[random_.draw() % (i + 1)]);
  const SharedMemory shared_memory(launch.shared_variable);
  for (const unsigned block : order) {
    shared_memory.poison();
    run_block(block);
    check_dynamic_shared_memory();
  }
}

// What lies beyond the memory asked for was filled with 0xff before the block.
void Machine::check_dynamic_shared_memory() const {
  const auto [begin, size] = launch_.dynamic_shared_memory;
  const auto is_poison = [](unsigned char byte) { return byte == 0xff; };
  if (std::all_of(begin + launch_.dynamic_shared_bytes, begin + size, is_poison)) return;
  throw std::runtime_error(place() + ": wrote beyond its " + std::to_string(launch_.dynamic_shared_bytes) +
                           " bytes of dynamic shared memory");
}

void Machine::grow(unsigned threads) {
  while (fibers_.size() < threads) {
    fibers_.push_back(std::make_unique<Fiber>());
    fibers_.back()->prepare(&Machine::fiber_main);
  }
}

void Machine::run_block(unsigned block) {
  // From one warp running as far ahead of the others as it can to all going on together: some races show only in the
  // first way, some only in the second.
  constexpr uint64_t kWhims[] = {~uint64_t{0}, 255, 15, 0};
  whim_ = kWhims[random_.draw() % 4];
  block_warps_ = (blockDim.x + kWarpSize - 1) / kWarpSize;
  favoured_warp_ = random_.draw() % block_warps_;
  blockIdx = {block, 0, 0};
  live_ = blockDim.x;
  at_barrier_ = 0;
  runnable_warps_ = 0;
  for (unsigned warp = 0, first = 0; first < blockDim.x; ++warp, first += kWarpSize) {
    const unsigned lanes = std::min<unsigned>(blockDim.x - first, kWarpSize);
    warps_[warp].waiting = warps_[warp].ended = warps_[warp].runnable = 0;
    make_runnable(warp, ~0u >> (kWarpSize - lanes));
  }
  stop(host_);
  if (error_.empty()) return;
  for (unsigned i = 0; i < blockDim.x; ++i) fibers_[i]->prepare(&Machine::fiber_main);
  throw std::runtime_error(std::exchange(error_, {}));
}

void Machine::fiber_main() {
  Machine& self = machine();
  for (;;) {  // one thread of a block after the other
    self.launch_.thread(self.launch_.closure);
    const unsigned thread = self.running_;
    self.warps_[thread / kWarpSize].ended |= 1u << thread % kWarpSize;
    --self.live_;
    self.stop(*self.fibers_[thread]);
  }
}

// --- which thread goes on -------------------------------------------------------------------------------------------

// The runnable lane at or after a random one, of the runnable warp at or after the favoured one.
bool Machine::choose(unsigned* thread) {
  if (runnable_warps_ == 0) return false;
  const auto at_or_after = [](unsigned set, unsigned first) {
    return (std::countr_zero(std::rotr(set, int(first))) + first) % kWarpSize;
  };
  const uint64_t draw = random_.draw();
  if ((draw >> 24 & whim_) == 0) favoured_warp_ = (draw >> 8 & 0xffff) * block_warps_ >> 16;
  const unsigned warp = at_or_after(runnable_warps_, favoured_warp_);
  *thread = warp * kWarpSize + at_or_after(warps_[warp].runnable, draw & 31);
  return true;
}

void Machine::make_runnable(unsigned warp, unsigned lanes) {
  warps_[warp].runnable |= lanes;
  runnable_warps_ |= 1u << warp;
}

// The running fiber, or the host, cannot go on; returns when it can.
void Machine::stop(Fiber& from) {
  unsigned thread = 0;
  if (choose(&thread)) {
    resume(from, thread);
  } else if (&from != &host_) {
    fail_unless_done();
    from.switch_to(host_);
  }
}

void Machine::resume(Fiber& from, unsigned thread) {
  Warp& warp = warps_[thread / kWarpSize];
  warp.runnable &= ~(1u << thread % kWarpSize);
  if (warp.runnable == 0) runnable_warps_ &= ~(1u << thread / kWarpSize);
  running_ = thread;
  threadIdx = {thread, 0, 0};
  ++switches;
  if (&from != fibers_[thread].get()) from.switch_to(*fibers_[thread]);
}

void Machine::preemption_point() {
  const unsigned thread = running_;
  make_runnable(thread / kWarpSize, 1u << thread % kWarpSize);
  stop(*fibers_[thread]);
}

// --- barriers, shuffles, votes --------------------------------------------------------------------------------------

void Machine::block_barrier(Site site) {
  const unsigned thread = running_;
  if (at_barrier_ == 0) barrier_site_ = site;
  if (site.line() != barrier_site_.line() || std::strcmp(site.file_name(), barrier_site_.file_name()) != 0) {
    report("comes to the __syncthreads at " + name_of(site) + " while others wait in the one at " +
           name_of(barrier_site_));
    abandon();
  }
  if (++at_barrier_ == blockDim.x) release_barrier();
  stop(*fibers_[thread]);
}

void Machine::release_barrier() {
  at_barrier_ = 0;
  for (unsigned warp = 0; warp * kWarpSize < blockDim.x; ++warp) {
    make_runnable(warp, ~0u >> (kWarpSize - std::min<unsigned>(blockDim.x - warp * kWarpSize, kWarpSize)));
  }
}

uint64_t Machine::warp_operation(Operation operation, unsigned mask, uint64_t value, int source, Site site) {
  const unsigned thread = running_, lane = thread % kWarpSize;
  Warp& warp = warps_[thread / kWarpSize];
  for (const unsigned named : {lane, is_shuffle(operation) ? unsigned(source) : lane}) {
    if (mask >> named & 1) continue;
    report("names lane " + std::to_string(named) + ", which is not in its mask " + hex(mask) + ", in " +
           name_of(operation) + " at " + name_of(site));
    abandon();
  }
  Arrival& arrival = warp.arrivals[lane];
  arrival = {mask, operation, source, value, 0, site};
  warp.waiting |= 1u << lane;
  if ((warp.waiting & mask) == mask && complete(warp, mask)) {
    warp.waiting &= ~mask;
    make_runnable(thread / kWarpSize, mask);
  }
  stop(*fibers_[thread]);
  return arrival.result;
}

// Gives all lanes in `mask`, who wait, their results, if all wait for each other in the same operation.
bool Machine::complete(Warp& warp, unsigned mask) {
  const Operation operation = warp.arrivals[std::countr_zero(mask)].operation;
  const auto each_lane = [mask](auto&& f) {
    for (unsigned left = mask; left != 0; left &= left - 1) f(std::countr_zero(left));
  };
  bool together = true;
  unsigned votes = 0;
  each_lane([&](int lane) {
    const Arrival& arrival = warp.arrivals[lane];
    together = together && arrival.mask == mask && arrival.operation == operation;
    votes |= unsigned(arrival.value != 0) << lane;
  });
  if (!together) return false;
  each_lane([&](int lane) {
    Arrival& arrival = warp.arrivals[lane];
    if (operation == Operation::ballot) {
      arrival.result = votes;
    } else if (operation == Operation::any) {
      arrival.result = votes != 0;
    } else if (operation == Operation::all) {
      arrival.result = votes == mask;
    } else if (operation != Operation::syncwarp) {
      arrival.result = warp.arrivals[arrival.source].value;
    }
  });
  return true;
}

// --- reports --------------------------------------------------------------------------------------------------------

void Machine::report(const std::string& what) {
  error_ = place() + ": thread " + std::to_string(running_) + " " + what;
}

// Leaves the running fiber for good, and with it whatever its frames still own; run_block prepares all fibers afresh.
void Machine::abandon() {
  fibers_[running_]->switch_to(host_);
  std::abort();
}

// Nothing is runnable: all threads have ended, or those that have not never will.
void Machine::fail_unless_done() {
  if (live_ != 0) error_ = place() + ": deadlock: " + describe_threads();
}

std::string Machine::place() const {
  return "CUDA emulation: kernel " + name_of_kernel(launch_.kernel) + ", block " + std::to_string(blockIdx.x) + " of " +
         std::to_string(gridDim.x) + ", " + std::to_string(blockDim.x) + " threads, seed " + std::to_string(seed_);
}

// Neighbours in the same state are named together.
std::string Machine::describe_threads() const {
  std::string all;
  for (unsigned first = 0, end = 0; first < blockDim.x; first = end) {
    const std::string state = describe(first);
    for (end = first + 1; end < blockDim.x && describe(end) == state;) ++end;
    all += (first == 0 ? "thread" : "; thread") + std::string(end - first > 1 ? "s " : " ") + std::to_string(first);
    if (end - first > 1) all += "-" + std::to_string(end - 1);
    all += " " + state;
  }
  return all;
}

std::string Machine::describe(unsigned thread) const {
  const Warp& warp = warps_[thread / kWarpSize];
  const unsigned lane = thread % kWarpSize;
  if (warp.ended >> lane & 1) return "ended";
  if ((warp.waiting >> lane & 1) == 0) return "in __syncthreads at " + name_of(barrier_site_);
  const Arrival& arrival = warp.arrivals[lane];
  return std::string("in ") + name_of(arrival.operation) + " with mask " + hex(arrival.mask) + " at " +
         name_of(arrival.site);
}

}  // namespace

void block_barrier(Site site) { machine().block_barrier(site); }

uint64_t warp_operation(Operation operation, unsigned mask, uint64_t value, int source, Site site) {
  return machine().warp_operation(operation, mask, value, source, site);
}

void preemption_point() { machine().preemption_point(); }

unsigned lane_of_this_thread() { return machine().lane(); }

void launch(const Launch& launch) { machine().launch(launch); }

}  // namespace cuda_emulation

void cuda_emulation_seed(uint64_t seed) { cuda_emulation::machine().seed(seed); }
uint64_t cuda_emulation_launches() { return cuda_emulation::machine().launches; }
uint64_t cuda_emulation_switches() { return cuda_emulation::machine().switches; }

const char* cuda_emulation_kernels() {
  static std::string names;
  names.clear();
  for (const void* kernel : cuda_emulation::machine().kernels) names += cuda_emulation::name_of_kernel(kernel) + "\n";
  return names.c_str();
}
