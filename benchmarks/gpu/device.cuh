// What programs for a CUDA device have in common: checked calls, arrays, timing by events, and
// lines of JSON.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace device {

#define DEVICE_CHECK(call)                                               \
  do {                                                                   \
    const cudaError_t status = (call);                                   \
    if (status != cudaSuccess) {                                         \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                   cudaGetErrorString(status));                          \
      std::exit(2);                                                      \
    }                                                                    \
  } while (0)

// Occupies one thread for a number of cycles of the multiprocessor's clock.
__global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    DEVICE_CHECK(cudaMalloc(&data_, count * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) { upload(host); }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  size_t size() const { return count_; }
  void fill_bytes(int byte) const { DEVICE_CHECK(cudaMemset(data_, byte, count_ * sizeof(T))); }
  void upload(const std::vector<T>& host) const {
    DEVICE_CHECK(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> download() const {
    std::vector<T> host(count_);
    DEVICE_CHECK(cudaMemcpy(host.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

struct Settings {
  cudaDeviceProp device;
  bool quick;       // a sixteenth of the work: to try the program, not to report
  double clock_hz;  // of the multiprocessors, measured
  int repetitions() const { return quick ? 3 : 21; }
  uint32_t scaled(uint32_t work) const { return quick ? work / 16 : work; }
};

struct Times {
  double median_ms, least_ms, most_ms;
};

// Times enqueue() on the default stream; prepare() is enqueued before each call and not timed.
template <typename Enqueue, typename Prepare>
Times time_calls(const Settings& settings, Enqueue enqueue, Prepare prepare) {
  cudaEvent_t start, stop;
  DEVICE_CHECK(cudaEventCreate(&start));
  DEVICE_CHECK(cudaEventCreate(&stop));
  // Long enough for the host to enqueue the rest.
  const long long lead = static_cast<long long>(50e-6 * settings.clock_hz);
  std::vector<float> times;
  for (int i = -2; i < settings.repetitions(); ++i) {  // two calls to warm up
    prepare();
    spin<<<1, 1>>>(lead);
    DEVICE_CHECK(cudaEventRecord(start));
    enqueue();
    DEVICE_CHECK(cudaGetLastError());
    DEVICE_CHECK(cudaEventRecord(stop));
    DEVICE_CHECK(cudaEventSynchronize(stop));
    float milliseconds = 0;
    DEVICE_CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
    if (i >= 0) times.push_back(milliseconds);
  }
  DEVICE_CHECK(cudaEventDestroy(start));
  DEVICE_CHECK(cudaEventDestroy(stop));
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back()};
}

template <typename Enqueue>
Times time_calls(const Settings& settings, Enqueue enqueue) {
  return time_calls(settings, enqueue, [] {});
}

inline double measure_clock(const Settings& settings) {
  cudaEvent_t start, stop;
  DEVICE_CHECK(cudaEventCreate(&start));
  DEVICE_CHECK(cudaEventCreate(&stop));
  const long long cycles = settings.quick ? 1000 * 1000 : 20 * 1000 * 1000;
  float milliseconds = 0;
  for (int i = 0; i < 2; ++i) {  // the first raises the clock
    DEVICE_CHECK(cudaEventRecord(start));
    spin<<<settings.device.multiProcessorCount, 32>>>(cycles);
    DEVICE_CHECK(cudaGetLastError());
    DEVICE_CHECK(cudaEventRecord(stop));
    DEVICE_CHECK(cudaEventSynchronize(stop));
    DEVICE_CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
  }
  DEVICE_CHECK(cudaEventDestroy(start));
  DEVICE_CHECK(cudaEventDestroy(stop));
  return static_cast<double>(cycles) / (milliseconds * 1e-3);
}

// Finds the device and prints what it is, as the first line of output. Ends the program where there
// is none.
inline Settings begin(const char* program, bool quick) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::fprintf(stderr, "%s: a CUDA device must be present, got none\n", program);
    std::exit(2);
  }
  Settings settings{};
  settings.quick = quick;
  int id = 0, runtime = 0, driver = 0;
  DEVICE_CHECK(cudaGetDevice(&id));
  DEVICE_CHECK(cudaGetDeviceProperties(&settings.device, id));
  DEVICE_CHECK(cudaRuntimeGetVersion(&runtime));
  DEVICE_CHECK(cudaDriverGetVersion(&driver));
  settings.clock_hz = measure_clock(settings);
  const cudaDeviceProp& device = settings.device;
  std::printf(
      "{\"device\": \"%s\", \"capability\": \"%d.%d\", \"multiprocessors\": %d, "
      "\"l2_bytes\": %d, \"memory_bytes\": %zu, \"clock_hz\": %.6e, \"cuda_runtime\": %d, "
      "\"cuda_driver\": %d, \"quick\": %s}\n",
      device.name, device.major, device.minor, device.multiProcessorCount, device.l2CacheSize,
      device.totalGlobalMem, settings.clock_hz, runtime, driver, quick ? "true" : "false");
  std::fflush(stdout);
  return settings;
}

}  // namespace device
