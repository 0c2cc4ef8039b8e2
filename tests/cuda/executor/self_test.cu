#include <cuda_runtime.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "executor.h"
#include "self_test.h"

namespace executor::self_test {
namespace {

constexpr unsigned kAllLanes = 0xffffffff;

struct alignas(128) Line {
  char bytes[128];
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
  void* pointers[] = {&arguments..., nullptr};
  return cudaLaunchKernel(kernel, grid, block, pointers, 0, current_stream());
}

// ---- warps --------------------------------------------------------------------------------------

template <class T>
__global__ void shuffle_index_kernel(const int* __restrict__ sources, int width, double* result) {
  const int lane = threadIdx.x;
  result[lane] = double(__shfl_sync(kAllLanes, T(100 + lane), sources[lane], width));
}

template <class T>
__global__ void shuffle_xor_kernel(int lane_mask, int width, double* result) {
  const int lane = threadIdx.x;
  result[lane] = double(__shfl_xor_sync(kAllLanes, T(100 + lane), lane_mask, width));
}

template <class F>
void with_type(const std::string& type, const F& f) {
  if (type == "int32") return f(int32_t());
  if (type == "uint32") return f(uint32_t());
  if (type == "int64") return f(int64_t());
  if (type == "float32") return f(float());
  if (type == "float64") return f(double());
  throw std::runtime_error("there is no type " + type);
}

__global__ void __launch_bounds__(32) neighbours_in_warp_kernel(bool with_barrier, int* result) {
  __shared__ int slots[32];
  const int lane = threadIdx.x;
  slots[lane] = lane;
  if (with_barrier) __syncwarp();
  result[2 * lane] = slots[(lane + 31) % 32];
  result[2 * lane + 1] = slots[(lane + 1) % 32];
}

__global__ void neighbours_in_block_kernel(bool with_barrier, int* result) {
  __shared__ int slots[64];
  const int i = threadIdx.x;
  slots[i] = i;
  if (with_barrier) __syncthreads();
  result[2 * i] = slots[(i + 63) % 64];
  result[2 * i + 1] = slots[(i + 1) % 64];
}

__global__ void warp_barrier_after_exit_kernel(int* result) {
  __shared__ int slots[32];
  const int lane = threadIdx.x;
  if (lane % 2 == 0) return;
  slots[lane] = lane;
  __syncwarp();
  result[lane] = slots[lane ^ 2];
}

// ---- blocks -------------------------------------------------------------------------------------

template <class T>
__global__ void unwritten_template_kernel(uint32_t* result) {
  __shared__ T slot;
  std::memcpy(result + 2 * blockIdx.x, &slot, sizeof(uint32_t));
  slot = T(blockIdx.x);
}

__global__ void unwritten_kernel(uint32_t* result) {
  __shared__ uint32_t slot;
  result[2 * blockIdx.x + 1] = slot;
  slot = blockIdx.x;
}

__global__ void indices_kernel(unsigned* result, int* count) {
  const unsigned numbers[] = {blockIdx.x,  blockIdx.y,  blockIdx.z,
                              threadIdx.x, threadIdx.y, threadIdx.z};
  std::memcpy(result + 6 * atomicAdd(count, 1), numbers, sizeof(numbers));
}

__global__ void atomic_kernel(double* sums) {
  atomicAdd(sums, 1);
  atomicAdd(sums + 1, threadIdx.x);
}

// ---- undefined behaviour ------------------------------------------------------------------------

__global__ void exited_lane_kernel() {
  if (threadIdx.x == 5) return;
  __shfl_sync(kAllLanes, 0, 0);
}

__global__ void shuffle_kernel(unsigned mask, int source, int width) {
  __shfl_sync(mask, 0, source, width);
}

__global__ void shuffles_that_do_not_meet_kernel() {
  if (threadIdx.x < 16) {
    __shfl_xor_sync(kAllLanes, 0, 16);
  } else {
    __shfl_xor_sync(kAllLanes, 0, 16);
  }
}

__global__ void barrier_after_exit_kernel() {
  if (threadIdx.x < 32) return;
  __syncthreads();
}

__global__ void barriers_of_two_branches_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_against_shuffle_kernel() {
  if (threadIdx.x < 31) __syncthreads();
  __shfl_sync(kAllLanes, 0, 0);
}

__global__ void nothing_kernel() {}

// ---- what is counted ----------------------------------------------------------------------------

__global__ void count_kernel(const int* places, int rows, unsigned bytes, const char* array,
                             bool with_barriers) {
  __shared__ Line lines[64];
  if (array == nullptr) array = reinterpret_cast<const char*>(lines);
  for (int i = 0; i < rows; ++i) {
    const int place = places[32 * i + threadIdx.x];
    if (place != -2) count(0, place == -1 ? nullptr : array + place, bytes);
    if (with_barriers) __syncwarp();
  }
}

__global__ void count_branches_kernel(const int* array) {
  if (threadIdx.x % 2 == 0) {
    count(1, array + threadIdx.x, sizeof(int));
  } else {
    count(1, array + threadIdx.x, sizeof(int));
  }
  __syncthreads();
  count(2, array + threadIdx.x, sizeof(int));
}

// ---- wrong addresses ----------------------------------------------------------------------------

__global__ void read_kernel(const float* source, int i, float* result) { *result = source[i]; }

__global__ void shared_read_kernel(int i, float* result) {
  __shared__ float slots[32];
  slots[threadIdx.x] = 0;
  *result = slots[i];
}

struct alignas(16) Vector {
  float elements[4];
};

__global__ void vector_kernel(const float* source, float* result) {
  *result = reinterpret_cast<const Vector*>(source)->elements[0];
}

struct Memory {
  explicit Memory(int count) : floats(new float[count]()) {}
  std::unique_ptr<float[]> floats;
};

}  // namespace

std::vector<double> shuffle_index(const char* type, const std::vector<int>& sources, int width) {
  std::vector<double> result(32);
  with_type(type, [&](auto zero) {
    launch(shuffle_index_kernel<decltype(zero)>, 1, 32, sources.data(), width, result.data());
  });
  return result;
}

std::vector<double> shuffle_xor(const char* type, int lane_mask, int width) {
  std::vector<double> result(32);
  with_type(type, [&](auto zero) {
    launch(shuffle_xor_kernel<decltype(zero)>, 1, 32, lane_mask, width, result.data());
  });
  return result;
}

std::vector<int> neighbours_in_warp(bool with_barrier) {
  std::vector<int> result(64);
  launch(neighbours_in_warp_kernel, 1, 32, with_barrier, result.data());
  return result;
}

std::vector<int> neighbours_in_block(bool with_barrier) {
  std::vector<int> result(128);
  launch(neighbours_in_block_kernel, 1, 64, with_barrier, result.data());
  return result;
}

std::vector<uint32_t> unwritten_shared_memory(unsigned num_blocks) {
  std::vector<uint32_t> result(2 * num_blocks);
  launch(unwritten_template_kernel<float>, num_blocks, 1, result.data());
  launch(unwritten_kernel, num_blocks, 1, result.data());
  return result;
}

std::vector<unsigned> indices_in_order_of_execution(const Size& grid, const Size& block) {
  std::vector<unsigned> result(6 * grid[0] * grid[1] * grid[2] * block[0] * block[1] * block[2]);
  int count = 0;
  launch(indices_kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
         result.data(), &count);
  return result;
}

std::vector<double> atomic_sums() {
  std::vector<double> sums(2);
  launch(atomic_kernel, 3, 64, sums.data());
  return sums;
}

void count_accesses(const std::vector<std::vector<int>>& places, unsigned bytes, bool shared,
                    bool with_barriers) {
  std::vector<int> flat;
  for (const auto& row : places) flat.insert(flat.end(), row.begin(), row.end());
  // Where the index of a cache begins anew.
  alignas(sizeof(Line) * 64) static Line lines[64];
  const char* const array = lines[0].bytes;
  const GuardedMemory memory("array", lines, sizeof(lines), Side::kDevice);
  launch(count_kernel, 1, 32, flat.data(), int(places.size()), bytes, shared ? nullptr : array,
         with_barriers);
}

void count_in_two_branches() {
  std::vector<Line> lines(2);
  const GuardedMemory memory("array", lines.data(), lines.size() * sizeof(Line), Side::kDevice);
  launch(count_branches_kernel, 1, 64, reinterpret_cast<const int*>(lines.data()));
}

void shuffle_with_exited_lane() { launch(exited_lane_kernel, 1, 32); }
void shuffle_with_lane_past_the_end_of_the_block() {
  launch(shuffle_kernel, 1, 40, kAllLanes, 0, 32);
}
void shuffle_reads_lane_that_is_not_named() { launch(shuffle_kernel, 1, 16, 0xffffu, 16, 32); }
void shuffle_is_called_by_lane_that_is_not_named() {
  launch(shuffle_kernel, 1, 32, 0xfffffffeu, 1, 32);
}
void shuffle_by_a_width_of_12() { launch(shuffle_kernel, 1, 32, kAllLanes, 0, 12); }
void shuffles_that_do_not_meet() { launch(shuffles_that_do_not_meet_kernel, 1, 32); }
void barrier_after_exit_of_a_warp() { launch(barrier_after_exit_kernel, 1, 64); }
void barriers_of_two_branches() { launch(barriers_of_two_branches_kernel, 1, 64); }
void barrier_against_shuffle() { launch(barrier_against_shuffle_kernel, 1, 32); }
void barrier_outside_of_kernels() { __syncthreads(); }

void kernel_reads_nowhere() {
  float result;
  launch(read_kernel, 1, 1, reinterpret_cast<const float*>(uintptr_t(4096)), 1, &result);
}

std::vector<int> warp_barrier_after_exit() {
  std::vector<int> result(32);
  launch(warp_barrier_after_exit_kernel, 1, 32, result.data());
  return result;
}

std::array<int, 3> launch_errors(const Size& grid, const Size& block) {
  const cudaError_t error =
      launch(nothing_kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]));
  const cudaError_t last = cudaGetLastError();
  return {error, last, cudaGetLastError()};
}

void launch_on_another_stream() {
  void* arguments[] = {nullptr};
  cudaLaunchKernel(nothing_kernel, 1, 1, arguments, 0, nullptr);
}

float kernel_reads_past_the_end() {
  const Memory memory(32);
  float result;
  launch(read_kernel, 1, 1, memory.floats.get(), 32, &result);
  return result;
}

float kernel_reads_past_the_end_of_shared_memory() {
  float result;
  launch(shared_read_kernel, 1, 32, 32, &result);
  return result;
}

float kernel_reads_host_memory() {
  const Memory memory(32);
  const GuardedMemory host("host", memory.floats.get(), 32 * sizeof(float), Side::kHost);
  float result;
  launch(read_kernel, 1, 1, memory.floats.get(), 0, &result);
  return result;
}

float host_reads_device_memory() {
  const Memory memory(32);
  const GuardedMemory on_device("device", memory.floats.get(), 32 * sizeof(float), Side::kDevice);
  float result;
  launch(read_kernel, 1, 1, memory.floats.get(), 0, &result);
  read_kernel(memory.floats.get(), 0, &result);
  return result;
}

float kernel_loads_a_vector_that_is_not_aligned() {
  const Memory memory(32);
  float result;
  launch(vector_kernel, 1, 1, memory.floats.get() + 1, &result);
  return result;
}

}  // namespace executor::self_test
