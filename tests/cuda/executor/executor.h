// Runs CUDA kernels on a CPU: one fiber per CUDA thread, blocks one after the other.
//
// A thread runs until it waits for others, so whatever a missing barrier would have ordered happens
// in the order of the lanes, which the caller chooses: a test that passes forward, reverse and at
// random rests on no order. What CUDA leaves undefined is an error that says where, and memory that
// was never written holds NaN. What it cannot show: time, and races between blocks.

#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "traffic.h"

namespace executor {

extern const bool kHasAddressSanitizer;

// The order in which the threads of a block, and the blocks of a grid, get their turn.
enum class Order { kForward, kReverse, kRandom };

enum class Fibers { kNative, kUcontext };

// The GPU that kernels and runtime calls find.
struct Device {
  Order order = Order::kForward;
  uint64_t seed = 0;  // of Order::kRandom
  Fibers fibers = Fibers::kNative;
  int num_multiprocessors = 4;
  int compute_capability = 75;
  bool counts_memory = false;
  Cache cache;
  int launch_error = cudaSuccess;  // what launches return instead of running,
  int launches_before_error = 0;   // from this one on

  int last_error = cudaSuccess;

  // Counted.
  int64_t num_launches = 0;
  int64_t num_blocks = 0;
  TrafficTable traffic;

  // The only stream to which work may go.
  cudaStream_t stream() { return reinterpret_cast<cudaStream_t>(this); }
};

// Makes a device the current one, as long as this object lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(Device& device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  Device* previous_;
};

// That of the current device.
cudaStream_t current_stream();

// Memory that kernels alone, or host code alone, may touch: under AddressSanitizer, a kernel that
// follows a pointer of the host, or host code that reads a device array, is caught.
enum class Side { kDevice, kHost };

class GuardedMemory {
 public:
  GuardedMemory(std::string name, void* address, size_t bytes, Side side);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  // Makes the memory accessible or not to code that runs on a side.
  void permit(Side side) const;

  const std::string& name() const { return name_; }
  bool holds(uintptr_t address) const { return address - uintptr_t(address_) < bytes_; }

 private:
  std::string name_;
  void* address_;
  size_t bytes_;
  Side side_;
};

}  // namespace executor
