#include "executor.h"

#include <link.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define MSDA_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MSDA_ADDRESS_SANITIZER
#endif
#endif
#ifdef MSDA_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

#if defined(__x86_64__)
#define MSDA_NATIVE_FIBERS
// Saves the stack pointer and continues on the other stack. The compiler takes care of all other
// registers.
extern "C" void executor_switch(void** save, void* load);
__asm__(R"(
.text
.globl executor_switch
.hidden executor_switch
.type executor_switch, @function
executor_switch:
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
  ret
.size executor_switch, .-executor_switch
)");
#endif

namespace executor {

#ifdef MSDA_ADDRESS_SANITIZER
const bool kHasAddressSanitizer = true;
#else
const bool kHasAddressSanitizer = false;
#endif

namespace {

constexpr size_t kStackBytes = 256 << 10;  // of address space; untouched pages cost nothing
constexpr size_t kPageBytes = 4096;
constexpr int kMaxThreads = 1024;  // of a block

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// ---- shared memory ------------------------------------------------------------------------------

thread_local char shared_memory_anchor;

// The thread-local storage of this library: the __shared__ variables of all kernels, and nothing
// else. That is why the Python bindings, which have thread-local variables of their own, are in
// another library.
struct SharedMemory {
  void* begin = nullptr;
  size_t bytes = 0;
};

SharedMemory find_shared_memory() {
  *const_cast<volatile char*>(&shared_memory_anchor) = 0;  // not allocated before its first use
  SharedMemory found;
  const auto visit = [](dl_phdr_info* library, size_t, void* result) {
    bool is_this_library = false;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const auto& part = library->dlpi_phdr[i];
      const auto here = reinterpret_cast<uintptr_t>(&find_shared_memory);
      const uintptr_t begin = library->dlpi_addr + part.p_vaddr;
      is_this_library |= part.p_type == PT_LOAD && here - begin < part.p_memsz;
    }
    for (int i = 0; is_this_library && i < library->dlpi_phnum; ++i) {
      if (library->dlpi_phdr[i].p_type == PT_TLS) {
        *static_cast<SharedMemory*>(result) = {library->dlpi_tls_data,
                                               library->dlpi_phdr[i].p_memsz};
      }
    }
    return is_this_library ? 1 : 0;
  };
  dl_iterate_phdr(visit, &found);
  if (found.begin == nullptr) fail("the shared memory of the kernels was not found");
  return found;
}

// ---- fibers -------------------------------------------------------------------------------------

// Tells AddressSanitizer whether memory may be touched.
void permit([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes,
            [[maybe_unused]] bool permitted) {
#ifdef MSDA_ADDRESS_SANITIZER
  if (permitted) {
    __asan_unpoison_memory_region(address, bytes);
  } else {
    __asan_poison_memory_region(address, bytes);
  }
#endif
}

// A stack with an unreadable page below it, on which functions run that take turns with the caller.
class Fiber {
 public:
  Fiber() {
    void* const memory = mmap(nullptr, kPageBytes + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_, kPageBytes, PROT_NONE);
  }

  ~Fiber() {
    permit(stack(), kStackBytes, true);
    munmap(memory_, kPageBytes + kStackBytes);
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls function, which must not return but end with leave_for_good(). What ran
  // here before is forgotten.
  void start(Fibers kind, void (*function)()) {
    kind_ = kind;
    fake_stack_ = nullptr;
#ifdef MSDA_NATIVE_FIBERS
    if (kind == Fibers::kNative) {
      // What executor_switch pops: six registers and the address to return to. Above them the
      // return address that a function expects where it starts.
      auto** top = reinterpret_cast<void**>(stack() + kStackBytes);
      *--top = nullptr;
      *--top = reinterpret_cast<void*>(function);
      for (int i = 0; i < 6; ++i) *--top = nullptr;
      stack_pointer_ = top;
      return;
    }
#endif
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, function, 0);
  }

  // From outside: runs the function until it leaves.
  void resume() {
    void* own_fake_stack = nullptr;
    before_switch(&own_fake_stack, stack(), kStackBytes);
    swap(&caller_stack_pointer_, stack_pointer_, &caller_context_, &context_);
    after_switch(own_fake_stack, nullptr, nullptr);
  }

  // From inside: back to where resume() was called.
  void leave() {
    before_switch(&fake_stack_, caller_stack_, caller_stack_bytes_);
    swap(&stack_pointer_, caller_stack_pointer_, &context_, &caller_context_);
    after_switch(fake_stack_, &caller_stack_, &caller_stack_bytes_);
  }

  [[noreturn]] void leave_for_good() {
    before_switch(nullptr, caller_stack_, caller_stack_bytes_);
    swap(&stack_pointer_, caller_stack_pointer_, &context_, &caller_context_);
    std::terminate();
  }

  // The first thing that the function does.
  void arrived() { after_switch(nullptr, &caller_stack_, &caller_stack_bytes_); }

 private:
  char* stack() const { return memory_ + kPageBytes; }

  void swap([[maybe_unused]] void** save, [[maybe_unused]] void* load, ucontext_t* save_context,
            ucontext_t* load_context) {
#ifdef MSDA_NATIVE_FIBERS
    if (kind_ == Fibers::kNative) return executor_switch(save, load);
#endif
    swapcontext(save_context, load_context);
  }

  // AddressSanitizer wants to know which stack is in use.
  static void before_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* bottom,
                            [[maybe_unused]] size_t bytes) {
#ifdef MSDA_ADDRESS_SANITIZER
    __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
#endif
  }
  static void after_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** bottom,
                           [[maybe_unused]] size_t* bytes) {
#ifdef MSDA_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(fake_stack, bottom, bytes);
#endif
  }

  char* memory_;
  Fibers kind_ = Fibers::kNative;
  void* stack_pointer_ = nullptr;
  void* caller_stack_pointer_ = nullptr;
  ucontext_t context_{};
  ucontext_t caller_context_{};
  void* fake_stack_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_stack_bytes_ = 0;
};

// ---- threads, warps, blocks ---------------------------------------------------------------------

enum class State { kReady, kWaiting, kExited };

enum class Kind { kSyncThreads, kSyncWarp, kShuffle, kShuffleXor, kAny };

constexpr const char* kKindNames[] = {"__syncthreads", "__syncwarp", "__shfl_sync",
                                      "__shfl_xor_sync", "__any_sync"};

// What a thread waits for: the lanes of its warp that mask names; for __syncthreads, all threads.
struct Meeting {
  Kind kind;
  Place place;
  unsigned mask;

  // Whether lanes hand each other something: then none that is named may have exited.
  bool is_exchange() const { return kind != Kind::kSyncThreads && kind != Kind::kSyncWarp; }
  bool is_same(const Meeting& other) const {
    return kind == other.kind && mask == other.mask && place.line == other.place.line &&
           std::strcmp(place.file, other.place.file) == 0;
  }
};

struct Thread {
  Fiber fiber;
  State state;
  Meeting meeting;                     // while waiting
  uint64_t brought;                    // the number it brings to a shuffle
  int source;                          // the lane whose number it wants
  uint64_t taken;                      // that number
  std::vector<MemoryAccess> accesses;  // since the last barrier of the warp
};

std::string describe(const Meeting& meeting) {
  const std::string file = meeting.place.file;
  std::ostringstream text;
  text << kKindNames[int(meeting.kind)] << " (" << file.substr(file.rfind('/') + 1) << ":"
       << meeting.place.line;
  if (meeting.kind != Kind::kSyncThreads) text << ", mask 0x" << std::hex << meeting.mask;
  text << ")";
  return text.str();
}

std::string describe(const uint3& index) {
  std::ostringstream text;
  text << "(" << index.x << ", " << index.y << ", " << index.z << ")";
  return text.str();
}

constexpr unsigned kAllLanes = 0xffffffff;

unsigned lane_bit(int lane) { return 1u << lane; }

Device* current_device = nullptr;

Device& device() {
  if (current_device == nullptr) fail("there is no current device");
  return *current_device;
}

// Runs one launch. One at a time exists: the threads find it through `running`.
class Launch {
 public:
  Launch(dim3 grid, dim3 block, const std::function<void()>& kernel)
      : grid_(grid),
        num_threads_(block.x * block.y * block.z),
        kernel_(kernel),
        random_(device().seed),
        turns_(num_threads_),
        shared_memory_(find_shared_memory()) {
    gridDim = grid;
    blockDim = block;
    while (threads_.size() < num_threads_) threads_.push_back(std::make_unique<Thread>());
    std::iota(turns_.begin(), turns_.end(), 0u);
    if (device().order == Order::kReverse) std::reverse(turns_.begin(), turns_.end());
  }

  void run() {
    const uint64_t num_blocks = uint64_t(grid_.x) * grid_.y * grid_.z;
    std::vector<uint64_t> blocks(num_blocks);
    std::iota(blocks.begin(), blocks.end(), uint64_t(0));
    if (device().order == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
    if (device().order == Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), random_);
    for (const uint64_t i : blocks) {
      blockIdx = {unsigned(i % grid_.x), unsigned(i / grid_.x % grid_.y),
                  unsigned(i / grid_.x / grid_.y)};
      try {
        run_block();
      } catch (...) {
        threads_.clear();  // some stopped half-way, and will not go on
        throw;
      }
      ++device().num_blocks;
    }
    if (device().cache.bytes > 0) look_up_blocks();
  }

  // Called by the thread that runs.
  uint64_t meet(const Meeting& meeting, uint64_t brought, int source);

  void count(const MemoryAccess& access) { thread(current_).accesses.push_back(access); }

  // The same, because it accessed an address that does not exist.
  [[noreturn]] void stop_thread(const void* address);

 private:
  friend void run_thread();

  Thread& thread(unsigned i) const { return *threads_[i]; }
  unsigned first_of_warp(unsigned i) const { return i - i % kWarpSize; }
  bool exited(unsigned i) const { return i >= num_threads_ || thread(i).state == State::kExited; }

  void run_block();
  void resume(unsigned i);
  void check_exchange(unsigned i) const;
  void count_memory(unsigned first);
  void look_up_blocks() const;
  const std::string& name_of(uintptr_t address) const;
  bool meet_in_block(const Meeting& meeting);
  bool meet_in_warp(unsigned first, const Meeting& meeting);
  [[noreturn]] void report_deadlock() const;

  // Kept between launches: making stacks is slow.
  static std::vector<std::unique_ptr<Thread>> threads_;

  const dim3 grid_;
  const unsigned num_threads_;
  const std::function<void()>& kernel_;
  std::mt19937_64 random_;
  std::vector<unsigned> turns_;
  const SharedMemory shared_memory_;
  unsigned current_ = 0;
  unsigned num_exited_ = 0;
  std::exception_ptr error_;
  std::map<unsigned, Lookups> lookups_;  // by block
};

std::vector<std::unique_ptr<Thread>> Launch::threads_;
Launch* running = nullptr;

// What each fiber runs.
void run_thread() {
  Thread& self = running->thread(running->current_);
  self.fiber.arrived();
  try {
    running->kernel_();
  } catch (...) {
    running->error_ = std::current_exception();
  }
  self.state = State::kExited;
  ++running->num_exited_;
  self.fiber.leave_for_good();
}

void Launch::stop_thread(const void* address) {
  std::ostringstream text;
  text << "block " << describe(blockIdx) << ", thread " << current_
       << " accessed memory that does not exist, at " << address;
  error_ = std::make_exception_ptr(std::runtime_error(text.str()));
  thread(current_).fiber.leave_for_good();
}

void Launch::run_block() {
  std::memset(shared_memory_.begin, 0xff, shared_memory_.bytes);
  num_exited_ = 0;
  for (unsigned i = 0; i < num_threads_; ++i) {
    thread(i).state = State::kReady;
    thread(i).fiber.start(device().fibers, &run_thread);
  }
  while (num_exited_ < num_threads_) {
    bool someone_ran = false;
    if (device().order == Order::kRandom) std::shuffle(turns_.begin(), turns_.end(), random_);
    for (const unsigned i : turns_) {
      if (thread(i).state != State::kReady) continue;
      someone_ran = true;
      resume(i);
    }
    if (!someone_ran) report_deadlock();
  }
  for (unsigned i = 0; i < num_threads_; i += kWarpSize) count_memory(i);
}

void Launch::resume(unsigned i) {
  current_ = i;
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  thread(i).fiber.resume();
  if (error_) std::rethrow_exception(error_);
  if (thread(i).state != State::kExited) return;

  // An exit may be what a __syncwarp waits for, and makes a shuffle impossible.
  const unsigned first = first_of_warp(i);
  for (unsigned j = first; j < std::min(first + kWarpSize, num_threads_); ++j) {
    if (thread(j).state != State::kWaiting) continue;
    const Meeting meeting = thread(j).meeting;
    if (meeting.kind == Kind::kSyncWarp) meet_in_warp(first, meeting);
    if (meeting.is_exchange()) check_exchange(j);
  }
}

uint64_t Launch::meet(const Meeting& meeting, uint64_t brought, int source) {
  const unsigned self = current_;
  Thread& me = thread(self);
  me.meeting = meeting;
  me.brought = brought;
  me.source = source;
  me.state = State::kWaiting;
  bool complete;
  if (meeting.kind == Kind::kSyncThreads) {
    complete = meet_in_block(meeting);
  } else {
    if (!(meeting.mask & lane_bit(self % kWarpSize))) {
      fail("block ", describe(blockIdx), ", thread ", self, ": ", describe(meeting),
           " does not name the lane that calls it, ", self % kWarpSize);
    }
    if (meeting.is_exchange()) check_exchange(self);
    complete = meet_in_warp(first_of_warp(self), meeting);
  }
  // The last one to come goes on at once, as it would if the others had been faster.
  if (!complete) me.fiber.leave();
  return me.taken;
}

void Launch::check_exchange(unsigned i) const {
  const Meeting& meeting = thread(i).meeting;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((meeting.mask & lane_bit(lane)) && exited(first_of_warp(i) + lane)) {
      fail("block ", describe(blockIdx), ", thread ", i, ": ", describe(meeting), " names lane ",
           lane, ", which has exited");
    }
  }
  if (!(meeting.mask & lane_bit(thread(i).source))) {
    fail("block ", describe(blockIdx), ", thread ", i, ": ", describe(meeting), " reads lane ",
         thread(i).source, ", which it does not name");
  }
}

// If all threads of the block wait at this meeting, lets them go on.
bool Launch::meet_in_block(const Meeting& meeting) {
  for (unsigned i = 0; i < num_threads_; ++i) {
    if (thread(i).state != State::kWaiting || !thread(i).meeting.is_same(meeting)) return false;
  }
  for (unsigned i = 0; i < num_threads_; ++i) thread(i).state = State::kReady;
  for (unsigned i = 0; i < num_threads_; i += kWarpSize) count_memory(i);
  return true;
}

// The same for the lanes named in the mask. __syncwarp does not wait for those that have exited.
bool Launch::meet_in_warp(unsigned first, const Meeting& meeting) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(meeting.mask & lane_bit(lane)) || exited(first + lane)) continue;
    const Thread& other = thread(first + lane);
    if (other.state != State::kWaiting || !other.meeting.is_same(meeting)) return false;
  }
  uint64_t any = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((meeting.mask & lane_bit(lane)) && !exited(first + lane)) {
      any |= thread(first + lane).brought;
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(meeting.mask & lane_bit(lane)) || exited(first + lane)) continue;
    Thread& other = thread(first + lane);
    if (meeting.is_exchange()) {
      other.taken = meeting.kind == Kind::kAny ? any : thread(first + other.source).brought;
    }
    other.state = State::kReady;
  }
  // Lanes that are not named may be in the middle of what they do.
  if (meeting.mask == kAllLanes) count_memory(first);
  return true;
}

// What the lanes of a warp have done since their last barrier.
void Launch::count_memory(unsigned first) {
  if (!device().counts_memory) return;
  std::vector<std::vector<MemoryAccess>*> lanes;
  bool has_any = false;
  for (unsigned i = first; i < std::min(first + kWarpSize, num_threads_); ++i) {
    lanes.push_back(&thread(i).accesses);
    has_any |= !lanes.back()->empty();
  }
  if (!has_any) return;
  count_warp(
      lanes, [&](uintptr_t address) -> const std::string& { return name_of(address); },
      device().traffic, lookups_[blockIdx.x]);
  if (device().cache.bytes == 0) lookups_.clear();
}

// Blocks come to the multiprocessors in turn.
void Launch::look_up_blocks() const {
  for (int i = 0; i < device().num_multiprocessors; ++i) {
    std::vector<const Lookups*> blocks;
    for (const auto& [block, lookups] : lookups_) {
      if (int(block % device().num_multiprocessors) == i) blocks.push_back(&lookups);
    }
    look_up(device().cache, blocks);
  }
}

void Launch::report_deadlock() const {
  // Threads by where they wait: how many, and the first.
  std::map<std::string, std::pair<int, unsigned>> waiting;
  for (unsigned i = 0; i < num_threads_; ++i) {
    if (thread(i).state != State::kWaiting) continue;
    const auto entry = waiting.emplace(describe(thread(i).meeting), std::make_pair(0, i)).first;
    ++entry->second.first;
  }
  std::ostringstream text;
  text << "block " << describe(blockIdx) << " cannot go on: of its " << num_threads_ << " threads";
  const char* separator = " ";
  for (const auto& [where, threads] : waiting) {
    text << separator << threads.first << " (first " << threads.second << ") wait in " << where;
    separator = ", ";
  }
  if (num_exited_ > 0) text << separator << num_exited_ << " have exited";
  throw std::runtime_error(text.str());
}

// ---- wild accesses ------------------------------------------------------------------------------

// While it lives, an access to memory that does not exist ends the launch instead of the process.
class FaultGuard {
 public:
  FaultGuard() {
    if (kHasAddressSanitizer) return;  // which explains it better
    static std::vector<char> stack(64 << 10);
    stack_t own{};
    own.ss_sp = stack.data();
    own.ss_size = stack.size();
    sigaltstack(&own, &previous_stack_);
    struct sigaction action{};
    action.sa_sigaction = &handle;
    // The handler does not return: its signal must not stay blocked.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &action, &previous_[i]);
  }

  ~FaultGuard() {
    if (kHasAddressSanitizer) return;
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &previous_[i], nullptr);
    sigaltstack(&previous_stack_, nullptr);
  }

  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;

 private:
  static constexpr std::array<int, 2> kSignals = {SIGSEGV, SIGBUS};

  static void handle(int, siginfo_t* info, void*) { running->stop_thread(info->si_addr); }

  stack_t previous_stack_{};
  std::array<struct sigaction, kSignals.size()> previous_{};
};

uint64_t meet(const Meeting& meeting, uint64_t brought = 0, int source = 0) {
  if (running == nullptr) fail(describe(meeting), " was called outside of a kernel");
  return running->meet(meeting, brought, source);
}

void check_width(const Meeting& meeting, int width) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
    fail(describe(meeting), ": width must be a power of two up to 32, got ", width);
  }
}

int lane_of_thread() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarpSize;
}

// ---- memory and errors --------------------------------------------------------------------------

std::set<const GuardedMemory*> guarded_memory;

// While it lives, code counts as running on the device.
struct OnDevice {
  OnDevice() {
    for (const GuardedMemory* memory : guarded_memory) memory->permit(Side::kDevice);
  }
  ~OnDevice() {
    for (const GuardedMemory* memory : guarded_memory) memory->permit(Side::kHost);
  }
};

const std::string& Launch::name_of(uintptr_t address) const {
  static const std::string shared_memory = kSharedMemory;
  if (address - uintptr_t(shared_memory_.begin) < shared_memory_.bytes) return shared_memory;
  for (const GuardedMemory* memory : guarded_memory) {
    if (memory->holds(address)) return memory->name();
  }
  fail("block ", describe(blockIdx), ": a kernel counts an access to memory that is no array, at ",
       reinterpret_cast<void*>(address));
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) device().last_error = error;
  return error;
}

}  // namespace

void sync_threads(const Place& place) { meet({Kind::kSyncThreads, place, 0}); }

void sync_warp(unsigned mask, const Place& place) { meet({Kind::kSyncWarp, place, mask}); }

uint64_t shuffle(unsigned mask, uint64_t bits, int source, int width, const Place& place) {
  const Meeting meeting{Kind::kShuffle, place, mask};
  check_width(meeting, width);
  const int group = lane_of_thread() & ~(width - 1);
  return meet(meeting, bits, group | (source & (width - 1)));
}

uint64_t shuffle_xor(unsigned mask, uint64_t bits, int lane_mask, int width, const Place& place) {
  const Meeting meeting{Kind::kShuffleXor, place, mask};
  check_width(meeting, width);
  // Lanes of a later group are out of reach, those of an earlier one are not.
  const int lane = lane_of_thread(), last_of_group = lane | (width - 1);
  const int source = (lane ^ lane_mask) & (kWarpSize - 1);
  return meet(meeting, bits, source <= last_of_group ? source : lane);
}

__attribute__((noinline)) void count(int kind, const void* address, size_t bytes) {
  if (!device().counts_memory) return;
  running->count({__builtin_return_address(0), kind, uintptr_t(address), uint32_t(bytes)});
}

int compute_capability() { return device().compute_capability; }

bool any(unsigned mask, bool predicate, const Place& place) {
  return meet({Kind::kAny, place, mask}, predicate, lane_of_thread()) != 0;
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const std::function<void()>& kernel) {
  if (stream != current_stream()) fail("a kernel was launched on another stream than the caller's");
  if (running != nullptr) fail("a kernel must not launch another one");
  if (shared_bytes != 0) fail("dynamic shared memory is not supported, got ", shared_bytes);
  constexpr unsigned kMaxGrid = 65535;  // of y and z; x may have 2^31 - 1
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool valid = threads >= 1 && threads <= kMaxThreads && block.z <= 64 && grid.x >= 1 &&
                     grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= kMaxGrid && grid.z >= 1 &&
                     grid.z <= kMaxGrid;
  if (!valid) return remember(cudaErrorInvalidConfiguration);
  if (device().launch_error != cudaSuccess &&
      device().num_launches >= device().launches_before_error) {
    return remember(cudaError_t(device().launch_error));
  }

  struct Running {
    explicit Running(Launch& launch) { running = &launch; }
    ~Running() { running = nullptr; }
  };
  ++device().num_launches;
  Launch this_launch(grid, block, kernel);
  const OnDevice on_device;
  const Running now(this_launch);
  const FaultGuard guard;
  this_launch.run();
  return cudaSuccess;
}

CurrentDevice::CurrentDevice(Device& device) : previous_(current_device) {
  current_device = &device;
}

CurrentDevice::~CurrentDevice() { current_device = previous_; }

cudaStream_t current_stream() { return device().stream(); }

GuardedMemory::GuardedMemory(std::string name, void* address, size_t bytes, Side side)
    : name_(std::move(name)), address_(address), bytes_(bytes), side_(side) {
  guarded_memory.insert(this);
  permit(Side::kHost);
}

GuardedMemory::~GuardedMemory() {
  guarded_memory.erase(this);
  permit(side_);
}

void GuardedMemory::permit(Side side) const { executor::permit(address_, bytes_, side == side_); }

}  // namespace executor

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  const int error = executor::device().last_error;
  executor::device().last_error = cudaSuccess;
  return cudaError_t(error);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0 || attribute != cudaDevAttrMultiProcessorCount) {
    return executor::remember(cudaErrorInvalidValue);
  }
  *value = executor::device().num_multiprocessors;
  return cudaSuccess;
}
