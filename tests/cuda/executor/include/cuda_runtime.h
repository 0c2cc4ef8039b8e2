// Stands in for CUDA's header of this name where kernels are compiled for a CPU: the part of the
// language and of the runtime that csrc/cuda uses, and no more. executor.cpp runs it.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

// ---- language -----------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// Thread-local only so that the linker gathers all of it in one place, where each block's can be
// poisoned; a section of its own would do, but GCC 12 puts no variable of a template into one.
#define __shared__ static thread_local

struct alignas(8) uint2 {
  unsigned x, y;
};

struct uint3 {
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

// Of the thread that runs.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace executor {

constexpr int kWarpSize = 32;

// Where in the source a thread waits for others. Threads that wait in different places do not meet.
struct Place {
  const char* file;
  int line;
};

void sync_threads(const Place& place);
void sync_warp(unsigned mask, const Place& place);
uint64_t shuffle(unsigned mask, uint64_t bits, int source, int width, const Place& place);
uint64_t shuffle_xor(unsigned mask, uint64_t bits, int lane_mask, int width, const Place& place);
bool any(unsigned mask, bool predicate, const Place& place);

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA has no such shuffle");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace executor

// Calls leave the last two arguments out: then they say where the call stands.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  executor::sync_threads({file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffff, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  executor::sync_warp(mask, {file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = executor::kWarpSize,
              const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const uint64_t bits = executor::to_bits(value);
  return executor::from_bits<T>(executor::shuffle(mask, bits, source, width, {file, line}));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = executor::kWarpSize,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const uint64_t bits = executor::to_bits(value);
  return executor::from_bits<T>(executor::shuffle_xor(mask, bits, lane_mask, width, {file, line}));
}

// Whether the predicate holds for any of the lanes that are named.
inline bool __any_sync(unsigned mask, bool predicate, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  return executor::any(mask, predicate, {file, line});
}

// One thread runs at a time: nothing can come between the two steps.
template <class T>
T atomicAdd(T* address, std::enable_if_t<true, T> value) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, int>);
  const T old = *address;
  *address = old + value;
  return old;
}

namespace executor {

// The running thread is about to access memory; or, with no address, stands by while others of its
// warp do. See traffic.h.
void count(int kind, const void* address, size_t bytes);

// Of the current device: 75 for 7.5.
int compute_capability();

}  // namespace executor

// ---- runtime ------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
};

using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace executor {

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const std::function<void()>& kernel);

template <class... Parameters, size_t... kIndices>
cudaError_t launch_with(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                        size_t shared_bytes, cudaStream_t stream,
                        std::index_sequence<kIndices...>) {
  return launch(grid, block, shared_bytes, stream, [=] {
    kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[kIndices])...);
  });
}

}  // namespace executor

// Runs the kernel before it returns.
template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  static_assert((!std::is_reference_v<Parameters> && ...), "kernels take parameters by value");
  return executor::launch_with(kernel, grid, block, arguments, shared_bytes, stream,
                               std::index_sequence_for<Parameters...>{});
}
