// Multi-scale deformable attention on the CPU, without torch and without Python: the forward of
// `msda.ms_deform_attn` and `msda.ms_deform_attn_fused` in plain C. Link libmsda_cpu.
//
// Arguments have the names, shapes and meaning that they have in Python, and are refused in the
// same words. Shape letters: B batch, S keys (pixels of all levels), Q queries, M heads, D channels
// per head, L levels, P points of each level, K samples of one query and head (of all levels
// together).
//
//   int64_t shapes[] = {32, 48, 16, 24};  // (height, width) of each level
//   ...
//   if (msda_ms_deform_attn(&value, &spatial_shapes, NULL, &locations, &weights, &output, NULL)) {
//     fprintf(stderr, "%s\n", msda_last_error());
//   }
//
// All functions may be called from several threads at once. From one call to the next, each
// thread holds the text of its last error, and nothing else.

#ifndef MSDA_H_
#define MSDA_H_

#include <stdint.h>

#ifndef MSDA_API
#define MSDA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// The types of elements. Those from MSDA_INT8 on are refused by name.
typedef enum msda_dtype {
  MSDA_FLOAT32 = 0,
  MSDA_FLOAT64 = 1,
  MSDA_FLOAT16 = 2,
  MSDA_BFLOAT16 = 3,
  MSDA_INT64 = 4,
  MSDA_INT32 = 5,
  MSDA_BOOL = 6,  // one byte, true where it is not 0
  MSDA_INT8 = 7,
  MSDA_UINT8 = 8,
  MSDA_INT16 = 9,
  MSDA_UINT16 = 10,
  MSDA_UINT32 = 11,
  MSDA_UINT64 = 12,
  MSDA_COMPLEX64 = 13,
  MSDA_COMPLEX128 = 14
} msda_dtype;

typedef enum msda_status {
  MSDA_OK = 0,
  MSDA_INVALID_ARGUMENT = 1,  // nothing was computed: an argument breaks a rule
  MSDA_OUT_OF_MEMORY = 2      // no memory for scratch space or for a copy: output is undefined
} msda_status;

// An array of the caller's, which stays the caller's.
typedef struct msda_tensor {
  void* data;            // output is written, others only read; any alignment; null if a size is 0
  const int64_t* sizes;  // (rank)
  const int64_t* strides;  // (rank), in elements, may be negative or 0; null: row-major, no gaps
  int32_t rank;            // up to 8
  int32_t dtype;           // msda_dtype
} msda_tensor;

// One part of the work of a call, and a loop over parts, which may run them side by side and in any
// order, and returns when all have run. `pool` is the loop's own.
typedef void (*msda_task)(void* state, int64_t index);
typedef void (*msda_loop)(void* pool, int64_t num_tasks, msda_task task, void* state);

// Optional arguments: a null pointer, or zeros, stands for the defaults.
typedef struct msda_options {
  const int64_t* num_points;  // (num_counts) one count for each level; locations and weights then
                              // have an axis K in place of L and P. Null: P points in each level
  int64_t num_counts;
  int32_t nearest;      // not 0: interpolation="nearest"; of the plain form only
  int32_t num_threads;  // at most so many tasks at once; 0: OMP_NUM_THREADS of the environment, or
                        // as many as there are processors for this process
  msda_loop loop;       // null: threads that are made for the call
  void* pool;           // handed to loop
} msda_options;

// Samples `value` at locations and sums with weights. Output must be contiguous; each other tensor
// that is not is copied first.
//
//   value               (B, S, M, D) float32, float64, float16 or bfloat16
//   spatial_shapes      (L, 2) int64 or int32: (height, width) of each level
//   level_start_index   (L,) int64 or int32: first key of each level; null: it follows from shapes
//   sampling_locations  (B, Q, M, L, P, 2) or (B, Q, M, K, 2), any of the four types: (x, y), 0..1
//                       across the map; what lies outside reads as zero
//   attention_weights   (B, Q, M, L, P) or (B, Q, M, K), any of the four types
//   output              (B, Q, M * D) of the type of value, contiguous; must not overlap the others
//   options             or null
//
// Returns an msda_status.
MSDA_API int msda_ms_deform_attn(const msda_tensor* value, const msda_tensor* spatial_shapes,
                                 const msda_tensor* level_start_index,
                                 const msda_tensor* sampling_locations,
                                 const msda_tensor* attention_weights, const msda_tensor* output,
                                 const msda_options* options);

// The same from what the network's layers give; locations and softmax are computed on the way.
//
//   reference_points  (B, Q, L or 1, 2 or 4) any of the four types: (x, y), or boxes (centre x,
//                     centre y, width, height), 0..1 across the map
//   sampling_offsets  (B, Q, M, L, P, 2) or (B, Q, M, K, 2): (x, y) in pixels of the level for
//                     points, in units of (width, height) / (2 P) for boxes
//   attention_logits  (B, Q, M, L, P) or (B, Q, M, K), before the softmax
//   padding_mask      (B, S) bool, true = padding, which reads as zero; or null
MSDA_API int msda_ms_deform_attn_fused(const msda_tensor* value, const msda_tensor* spatial_shapes,
                                       const msda_tensor* level_start_index,
                                       const msda_tensor* reference_points,
                                       const msda_tensor* sampling_offsets,
                                       const msda_tensor* attention_logits,
                                       const msda_tensor* padding_mask, const msda_tensor* output,
                                       const msda_options* options);

// Why the last call of this thread that failed did: "<name> must <rule>, got <value>". Valid until
// this thread's next failure; "" before the first.
MSDA_API const char* msda_last_error(void);

// The threads that a call takes where num_threads is 0.
MSDA_API int msda_num_threads(void);

// "0.1.0", and the table of arguments, a line each.
MSDA_API const char* msda_version(void);
MSDA_API const char* msda_arguments(void);

// The instruction set in use, or null where MSDA_CPU_CAPABILITY (environment) names one that cannot
// be used; space-separated names of those compiled in, and of those that this machine runs.
MSDA_API const char* msda_cpu_capability(void);
MSDA_API const char* msda_compiled_cpu_capabilities(void);
MSDA_API const char* msda_supported_cpu_capabilities(void);

#ifdef __cplusplus
}
#endif

#endif  // MSDA_H_
