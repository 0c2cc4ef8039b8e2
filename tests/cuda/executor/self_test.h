// Kernels that show what the executor does, each with the host code that launches it on the current
// device.

#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace executor::self_test {

using Size = std::array<unsigned, 3>;

// One warp. Lane i brings 100 + i, of the type called "int32", "uint32", "int64", "float32" or
// "float64"; the result is what each got.
std::vector<double> shuffle_index(const char* type, const std::vector<int>& sources, int width);
std::vector<double> shuffle_xor(const char* type, int lane_mask, int width);

// Thread i writes i to shared memory and reads, after a barrier, what its neighbours wrote (those
// at both ends are neighbours too): the results are (left, right) of each.
std::vector<int> neighbours_in_warp(bool with_barrier);
std::vector<int> neighbours_in_block(bool with_barrier);

// Each block reads a shared array before it writes to it: what each found, in a kernel and in an
// instance of a kernel template.
std::vector<uint32_t> unwritten_shared_memory(unsigned num_blocks);

// Each thread appends (block x, y, z, thread x, y, z).
std::vector<unsigned> indices_in_order_of_execution(const Size& grid, const Size& block);

// Each of 64 threads in each of 3 blocks adds 1 and its index: the two sums.
std::vector<double> atomic_sums();

// One warp. In access i, lane l touches `bytes` at places[i][l] of an array, or of shared memory;
// or it stands by (-1); or it goes another way, on which it tells nothing (-2).
void count_accesses(const std::vector<std::vector<int>>& places, unsigned bytes, bool shared,
                    bool with_barriers);
// 64 threads of two warps write an int each, the odd lanes after the even ones.
void count_in_two_branches();

// What CUDA leaves undefined.
void shuffle_with_exited_lane();
void shuffle_with_lane_past_the_end_of_the_block();
void shuffle_reads_lane_that_is_not_named();
void shuffle_is_called_by_lane_that_is_not_named();
void shuffle_by_a_width_of_12();
void shuffles_that_do_not_meet();
void barrier_after_exit_of_a_warp();
void barriers_of_two_branches();
void barrier_against_shuffle();
void barrier_outside_of_kernels();

// Reads where there is no memory.
void kernel_reads_nowhere();

// What CUDA allows: lanes of an even index exit before the others call __syncwarp, after which lane
// i reads what lane i ^ 2 wrote.
std::vector<int> warp_barrier_after_exit();

// (returned, cudaGetLastError() after it, and once more).
std::array<int, 3> launch_errors(const Size& grid, const Size& block);
void launch_on_another_stream();

// What only sanitizers see. The results are what was read.
float kernel_reads_past_the_end();
float kernel_reads_past_the_end_of_shared_memory();
float kernel_reads_host_memory();
float host_reads_device_memory();
float kernel_loads_a_vector_that_is_not_aligned();

}  // namespace executor::self_test
