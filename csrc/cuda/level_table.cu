// Fills the table of levels in memory, and checks the sizes that the host does not know. The host's
// own checks: ../call.h, and msda/checks.py for Python.

#include <cassert>
#include <stdexcept>

#include "launch.cuh"

namespace msda {
namespace {

// Ends the kernel, and with it the process's use of the GPU, as torch's own index checks do. The
// next call that waits for the GPU reports it.
MSDA_DEVICE void refuse(const char* message) {
#ifdef __CUDA_ARCH__
  __assert_fail(message, "msda", 0, "level_table_kernel");
#else
  throw std::runtime_error(message);
#endif
}

// Fills entries first to last - 1 of the table, after those before. One thread.
__global__ void level_table_kernel(const __grid_constant__ LevelTableParams params) {
  int64_t start = 0;
  if (params.first > 0) {
    const DeviceLevel before = params.table[params.first - 1];
    start = before.start + int64_t(before.height) * before.width;
  }
  for (int l = params.first; l < params.last; ++l) {
    DeviceLevel level = params.levels[l - params.first];
    if (params.has_shapes) {
      const auto size = [&](int i) {
        return params.shapes_are_int64 ? static_cast<const int64_t*>(params.shapes)[i]
                                       : int64_t(static_cast<const int32_t*>(params.shapes)[i]);
      };
      const int64_t height = size(2 * l), width = size(2 * l + 1);
      if (height <= 0 || width <= 0 || width > kMaxWidth ||
          height > (params.num_keys - start) / width) {
        return refuse("spatial_shapes must be positive and cover the S keys of value");
      }
      level.height = int32_t(height);
      level.width = int32_t(width);
      level.start = int32_t(start);
    }
    start += int64_t(level.height) * level.width;
    params.table[l] = level;
  }
  if (params.last == params.num_levels && start != params.num_keys) {
    refuse("spatial_shapes must cover the S keys of value");
  }
}

}  // namespace

int64_t level_table_bytes(int64_t num_levels, bool shapes_on_device) {
  return needs_level_table(num_levels, shapes_on_device) ? num_levels * int64_t(sizeof(DeviceLevel))
                                                         : 0;
}

void fill_level_table(const LevelTableParams& params, void* stream) {
  launch(level_table_kernel, 1, 1, stream, params);
}

}  // namespace msda
