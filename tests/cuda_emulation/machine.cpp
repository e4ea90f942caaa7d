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
  SharedMemory() = default;
  explicit SharedMemory(const unsigned char* one_of_them) : one_of_them(one_of_them) {
    dl_iterate_phdr(&SharedMemory::examine, this);
    if (begin == nullptr) throw std::logic_error("CUDA emulation: found no thread-local storage");
  }

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

  const unsigned char* one_of_them = nullptr;
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
  unsigned runnable, waiting, at_cluster_barrier, ended;
  Arrival arrivals[kWarpSize];
};

struct Block {
  unsigned index;
  Warp warps[kMaxThreads / kWarpSize];
  unsigned runnable_warps = 0;  // those with a runnable lane
  unsigned live = 0;            // threads that have not ended
  unsigned at_barrier = 0;      // threads that wait in __syncthreads
  Site barrier_site, cluster_site;
  unsigned favoured_warp = 0;
  uint64_t whim = 0;
  std::vector<unsigned char> shared_memory;  // while other blocks run
};

class Machine {
 public:
  void launch(const Launch& launch);
  void block_barrier(Site site);
  void cluster_barrier(Site site);
  void* shared_memory_of(const void* p, unsigned rank, Site site);
  uint64_t warp_operation(Operation operation, unsigned mask, uint64_t value, int source, Site site);
  void preemption_point();
  unsigned lane() const { return running_ % kWarpSize; }
  void seed(uint64_t seed) { random_ = Random(seed_ = seed); }

  uint64_t launches = 0, switches = 0;
  std::set<const void*> kernels;  // launched so far
  const void* last_kernel = nullptr;

 private:
  static void fiber_main();
  void run_cluster(unsigned first);
  void begin_block(unsigned rank, unsigned index);
  bool choose_block();
  void run_block();
  void check_dynamic_shared_memory();
  Fiber& fiber(unsigned thread) { return *fibers_[(block_ - cluster_.data()) * launch_.threads + thread]; }
  bool choose(unsigned* thread);
  void resume(Fiber& from, unsigned thread);
  void stop(Fiber& from);
  static void make_runnable(Block& block, unsigned warp, unsigned lanes);
  void release(Block& block);
  bool complete(Warp& warp, unsigned mask);
  void report(const std::string& what);
  [[noreturn]] void abandon();
  std::string describe_threads() const;
  std::string describe(unsigned thread) const;
  std::string place() const;

  std::mutex mutex_;  // one launch at a time
  uint64_t seed_ = 0;
  Random random_{0};

  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber host_;

  Launch launch_{};
  SharedMemory shared_memory_;
  unsigned block_warps_ = 0;
  std::vector<Block> cluster_;       // that runs
  unsigned at_cluster_barrier_ = 0;  // threads of all its blocks
  Block* block_ = nullptr;           // of them, that runs
  unsigned running_ = 0;             // its thread
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
  last_kernel = launch.kernel;
  launch_ = launch;
  gridDim = dim3(launch.blocks);
  blockDim = dim3(launch.threads);
  block_warps_ = (launch.threads + kWarpSize - 1) / kWarpSize;
  while (fibers_.size() < launch.cluster * launch.threads) {
    fibers_.push_back(std::make_unique<Fiber>());
    fibers_.back()->prepare(&Machine::fiber_main);
  }
  shared_memory_ = SharedMemory(launch.shared_variable);
  std::vector<unsigned> order(launch.blocks / launch.cluster);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned i = unsigned(order.size()); i-- > 1;) std::swap(order[i], order[random_.draw() % (i + 1)]);
  for (const unsigned cluster : order) run_cluster(cluster * launch.cluster);
}

// The blocks from `first` on, in turns: a block goes on until all its threads wait for other blocks, or have ended.
void Machine::run_cluster(unsigned first) {
  cluster_.resize(launch_.cluster);
  at_cluster_barrier_ = 0;
  for (unsigned rank = 0; rank < launch_.cluster; ++rank) begin_block(rank, first + rank);
  while (error_.empty() && choose_block()) run_block();
  for (Block& block : cluster_) {
    block_ = &block;
    blockIdx = {block.index, 0, 0};
    if (error_.empty() && block.live != 0) error_ = place() + ": deadlock: " + describe_threads();
  }
  if (error_.empty()) return;
  for (const auto& fiber : fibers_) fiber->prepare(&Machine::fiber_main);
  throw std::runtime_error(std::exchange(error_, {}));
}

void Machine::begin_block(unsigned rank, unsigned index) {
  // From one warp running as far ahead of the others as it can to all going on together: some races show only in the
  // first way, some only in the second.
  constexpr uint64_t kWhims[] = {~uint64_t{0}, 255, 15, 0};
  Block& block = cluster_[rank];
  block.index = index;
  for (unsigned warp = 0; warp < block_warps_; ++warp) {
    block.warps[warp].waiting = block.warps[warp].at_cluster_barrier = block.warps[warp].ended = 0;
  }
  block.live = launch_.threads;
  block.at_barrier = 0;
  block.whim = kWhims[random_.draw() % 4];
  block.favoured_warp = random_.draw() % block_warps_;
  block.shared_memory.assign(shared_memory_.size, 0xff);
  release(block);
}

// One of those that can go on.
bool Machine::choose_block() {
  const unsigned first = random_.draw() % launch_.cluster;
  for (unsigned i = 0; i < launch_.cluster; ++i) {
    block_ = &cluster_[(first + i) % launch_.cluster];
    if (block_->runnable_warps != 0) return true;
  }
  return false;
}

void Machine::run_block() {
  blockIdx = {block_->index, 0, 0};
  std::memcpy(shared_memory_.begin, block_->shared_memory.data(), shared_memory_.size);
  stop(host_);
  check_dynamic_shared_memory();
  std::memcpy(block_->shared_memory.data(), shared_memory_.begin, shared_memory_.size);
}

// What lies beyond the memory asked for was filled with 0xff before the block.
void Machine::check_dynamic_shared_memory() {
  const auto [begin, size] = launch_.dynamic_shared_memory;
  const auto is_poison = [](unsigned char byte) { return byte == 0xff; };
  if (!error_.empty() || std::all_of(begin + launch_.dynamic_shared_bytes, begin + size, is_poison)) return;
  error_ = place() + ": wrote beyond its " + std::to_string(launch_.dynamic_shared_bytes) +
           " bytes of dynamic shared memory";
}

void Machine::fiber_main() {
  Machine& self = machine();
  for (;;) {  // one thread of a block after the other
    self.launch_.thread(self.launch_.closure);
    const unsigned thread = self.running_;
    self.block_->warps[thread / kWarpSize].ended |= 1u << thread % kWarpSize;
    --self.block_->live;
    self.stop(self.fiber(thread));
  }
}

// --- which thread goes on -------------------------------------------------------------------------------------------

// Of the running block: the runnable lane at or after a random one, of the runnable warp at or after the favoured one.
bool Machine::choose(unsigned* thread) {
  if (block_->runnable_warps == 0) return false;
  const auto at_or_after = [](unsigned set, unsigned first) {
    return (std::countr_zero(std::rotr(set, int(first))) + first) % kWarpSize;
  };
  const uint64_t draw = random_.draw();
  if ((draw >> 24 & block_->whim) == 0) block_->favoured_warp = (draw >> 8 & 0xffff) * block_warps_ >> 16;
  const unsigned warp = at_or_after(block_->runnable_warps, block_->favoured_warp);
  *thread = warp * kWarpSize + at_or_after(block_->warps[warp].runnable, draw & 31);
  return true;
}

void Machine::make_runnable(Block& block, unsigned warp, unsigned lanes) {
  block.warps[warp].runnable |= lanes;
  block.runnable_warps |= 1u << warp;
}

// The running fiber, or the host, cannot go on; returns when it can.
void Machine::stop(Fiber& from) {
  unsigned thread = 0;
  if (choose(&thread)) {
    resume(from, thread);
  } else if (&from != &host_) {
    from.switch_to(host_);
  }
}

void Machine::resume(Fiber& from, unsigned thread) {
  Warp& warp = block_->warps[thread / kWarpSize];
  warp.runnable &= ~(1u << thread % kWarpSize);
  if (warp.runnable == 0) block_->runnable_warps &= ~(1u << thread / kWarpSize);
  running_ = thread;
  threadIdx = {thread, 0, 0};
  ++switches;
  if (Fiber& next = fiber(thread); &from != &next) from.switch_to(next);
}

void Machine::preemption_point() {
  const unsigned thread = running_;
  make_runnable(*block_, thread / kWarpSize, 1u << thread % kWarpSize);
  stop(fiber(thread));
}

// --- barriers, shuffles, votes --------------------------------------------------------------------------------------

void Machine::block_barrier(Site site) {
  const unsigned thread = running_;
  const Site& others = block_->barrier_site;
  if (block_->at_barrier == 0) block_->barrier_site = site;
  if (site.line() != others.line() || std::strcmp(site.file_name(), others.file_name()) != 0) {
    report("comes to the __syncthreads at " + name_of(site) + " while others wait in the one at " + name_of(others));
    abandon();
  }
  if (++block_->at_barrier == launch_.threads) {
    block_->at_barrier = 0;
    release(*block_);
  }
  stop(fiber(thread));
}

void Machine::cluster_barrier(Site site) {
  const unsigned thread = running_;
  block_->cluster_site = site;
  block_->warps[thread / kWarpSize].at_cluster_barrier |= 1u << thread % kWarpSize;
  if (++at_cluster_barrier_ == launch_.cluster * launch_.threads) {
    at_cluster_barrier_ = 0;
    for (Block& block : cluster_) {
      for (unsigned warp = 0; warp < block_warps_; ++warp) block.warps[warp].at_cluster_barrier = 0;
      release(block);
    }
  }
  stop(fiber(thread));
}

// Lets all threads of a block go on.
void Machine::release(Block& block) {
  block.runnable_warps = 0;
  for (unsigned warp = 0; warp < block_warps_; ++warp) {
    block.warps[warp].runnable = 0;
    make_runnable(block, warp, ~0u >> (kWarpSize - std::min<unsigned>(launch_.threads - warp * kWarpSize, kWarpSize)));
  }
}

// Where the block of that rank keeps, while this one runs, the variable that this one has at p.
void* Machine::shared_memory_of(const void* p, unsigned rank, Site site) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(p) - shared_memory_.begin;
  if (rank >= launch_.cluster || offset < 0 || size_t(offset) >= shared_memory_.size || cluster_[rank].live == 0) {
    report("asks at " + name_of(site) + " for memory of block " + std::to_string(rank) + " of its cluster, which " +
           (rank >= launch_.cluster    ? "has no such block"
            : cluster_[rank].live == 0 ? "has ended"
                                       : "is not shared memory"));
    abandon();
  }
  return (&cluster_[rank] == block_ ? shared_memory_.begin : cluster_[rank].shared_memory.data()) + offset;
}

uint64_t Machine::warp_operation(Operation operation, unsigned mask, uint64_t value, int source, Site site) {
  const unsigned thread = running_, lane = thread % kWarpSize;
  Warp& warp = block_->warps[thread / kWarpSize];
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
    make_runnable(*block_, thread / kWarpSize, mask);
  }
  stop(fiber(thread));
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

// Leaves the running fiber for good, and with it whatever its frames still own; run_cluster prepares all fibers afresh.
void Machine::abandon() {
  fiber(running_).switch_to(host_);
  std::abort();
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
  const Warp& warp = block_->warps[thread / kWarpSize];
  const unsigned lane = thread % kWarpSize;
  if (warp.ended >> lane & 1) return "ended";
  if (warp.at_cluster_barrier >> lane & 1) return "in the cluster's sync at " + name_of(block_->cluster_site);
  if ((warp.waiting >> lane & 1) == 0) return "in __syncthreads at " + name_of(block_->barrier_site);
  const Arrival& arrival = warp.arrivals[lane];
  return std::string("in ") + name_of(arrival.operation) + " with mask " + hex(arrival.mask) + " at " +
         name_of(arrival.site);
}

}  // namespace

void block_barrier(Site site) { machine().block_barrier(site); }

void cluster_barrier(Site site) { machine().cluster_barrier(site); }

void* shared_memory_of(const void* p, unsigned rank, Site site) { return machine().shared_memory_of(p, rank, site); }

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

const char* cuda_emulation_last_kernel() {
  static std::string name;
  name = cuda_emulation::name_of_kernel(cuda_emulation::machine().last_kernel);
  return name.c_str();
}
