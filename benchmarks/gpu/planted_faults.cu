// Kernels that are wrong on purpose, one fault per argument: what each tool of compute-sanitizer
// must find before its silence about our own kernels means anything.
//
//   nvcc -std=c++17 -O1 -arch=native -o planted_faults benchmarks/gpu/planted_faults.cu
//   compute-sanitizer --tool racecheck ./planted_faults racecheck

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace msda {  // the namespace of our kernels, by which the tools are told what to look at

constexpr int kThreads = 64;  // two warps

// memcheck: each thread writes far behind the end of its array.
__global__ void write_out_of_bounds(int* numbers) { numbers[(1 << 14) + threadIdx.x] = 1; }

// racecheck: one warp reads what the other writes, with no barrier between them.
__global__ void race(int* numbers) {
  __shared__ int exchanged[kThreads];
  exchanged[threadIdx.x] = numbers[threadIdx.x];
  numbers[threadIdx.x] = exchanged[kThreads - 1 - threadIdx.x];
}

// synccheck: half of each warp goes to a barrier that is for all.
__global__ void diverge_at_barrier(int* numbers) {
  if (threadIdx.x % 2 == 0) __syncthreads();
  numbers[threadIdx.x] = 1;
}

// initcheck: the lower half of the array is computed from the upper half, which nobody wrote.
__global__ void read_uninitialized(int* numbers) {
  numbers[threadIdx.x] = numbers[kThreads + threadIdx.x] + 1;
}

}  // namespace msda

int main(int count, char** arguments) {
  const char* const tool = count == 2 ? arguments[1] : "";
  int* numbers = nullptr;
  if (cudaMalloc(&numbers, 2 * msda::kThreads * sizeof(int)) != cudaSuccess) {
    std::fprintf(stderr, "planted_faults: a CUDA device must be present, got none\n");
    return 2;
  }
  if (std::strcmp(tool, "initcheck") != 0) {
    cudaMemset(numbers, 1, 2 * msda::kThreads * sizeof(int));
  }
  if (std::strcmp(tool, "memcheck") == 0) {
    msda::write_out_of_bounds<<<1, msda::kThreads>>>(numbers);
  } else if (std::strcmp(tool, "racecheck") == 0) {
    msda::race<<<1, msda::kThreads>>>(numbers);
  } else if (std::strcmp(tool, "synccheck") == 0) {
    msda::diverge_at_barrier<<<1, msda::kThreads>>>(numbers);
  } else if (std::strcmp(tool, "initcheck") == 0) {
    msda::read_uninitialized<<<1, msda::kThreads>>>(numbers);
  } else {
    std::fprintf(stderr, "usage: planted_faults memcheck|racecheck|synccheck|initcheck\n");
    return 2;
  }
  const cudaError_t status = cudaDeviceSynchronize();
  std::printf("%s: %s\n", tool, cudaGetErrorString(status));
  cudaFree(numbers);
  return status == cudaSuccess ? 0 : 1;
}
