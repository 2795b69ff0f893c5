/* One engine ahead of time: kernels, weights and a plan in a library or an executable, with no other run-time.
 *
 * A library exports toolchain_model(); a static executable links it.  Nothing here reads files or bundles: that is
 * toolchain_runtime.h's part.  No function keeps a pointer that the caller gave beyond the call.
 */
#ifndef TOOLCHAIN_MODEL_H
#define TOOLCHAIN_MODEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a struct or a meaning below changes; toolchain_model()->abi tells which one an engine has.  Members
 * are only ever added at the end: who understands one version opens engines of all earlier ones. */
#define TC_MODEL_ABI 2u

/* Every buffer that an engine reads or writes is best aligned so; unaligned ones are copied. */
#define TC_ALIGNMENT 64u

typedef enum tc_dtype {
  TC_BOOL = 1,
  TC_INT8 = 2,
  TC_INT16 = 3,
  TC_INT32 = 4,
  TC_INT64 = 5,
  TC_UINT8 = 6,
  TC_UINT16 = 7,
  TC_UINT32 = 8,
  TC_UINT64 = 9,
  TC_FLOAT16 = 10,
  TC_FLOAT32 = 11,
  TC_FLOAT64 = 12
} tc_dtype;

/* Bytes of one element; 0 for what is no dtype. */
static inline size_t tc_item_size(int32_t dtype) {
  switch (dtype) {
    case TC_BOOL: case TC_INT8: case TC_UINT8: return 1;
    case TC_INT16: case TC_UINT16: case TC_FLOAT16: return 2;
    case TC_INT32: case TC_UINT32: case TC_FLOAT32: return 4;
    case TC_INT64: case TC_UINT64: case TC_FLOAT64: return 8;
    default: return 0;
  }
}

typedef enum tc_model_status {
  TC_MODEL_OK = 0,
  TC_MODEL_NO_MEMORY = 1,  /* the arena or the threads could not be had */
  TC_MODEL_BAD_SIZE = 2,   /* a dimension outside its range */
  TC_MODEL_BUSY = 3,       /* the instance is running in another thread */
  TC_MODEL_FAILED = 4      /* a kernel reported an error */
} tc_model_status;

/* A dynamic dimension and its range; max is INT64_MAX when there is none. */
typedef struct tc_dim {
  const char *name;
  int64_t min;
  int64_t max;
} tc_dim;

/* An axis of an output whose size is computed from several dimensions: output_shape() tells it. */
#define TC_COMPUTED INT64_MIN

/* shape[i] >= 0 is a size; shape[i] < 0 is the dynamic dimension number -(shape[i] + 1), or TC_COMPUTED. */
typedef struct tc_tensor {
  const char *name;
  int32_t dtype; /* a tc_dtype */
  int32_t rank;
  const int64_t *shape;
} tc_tensor;

typedef struct tc_instance tc_instance;

typedef struct tc_model {
  uint32_t abi; /* TC_MODEL_ABI of the engine */
  uint32_t num_inputs;
  uint32_t num_outputs;
  uint32_t num_dims;
  const tc_tensor *inputs;
  const tc_tensor *outputs;
  const tc_dim *dims;
  uint64_t weight_bytes; /* constants, mapped with the library */

  /* Writes the shape of an output for these sizes, rank values; dims has num_dims values. */
  void (*output_shape)(uint32_t output, const int64_t *dims, int64_t *shape);

  /* Bytes of the arena that a run with these sizes needs; dims has num_dims values. */
  uint64_t (*arena_bytes)(const int64_t *dims);

  /* Makes an instance: its threads (0: one for each processor it may use) and, for static sizes, its arena. */
  int32_t (*open)(int32_t threads, tc_instance **instance);

  /* Runs once.  inputs and outputs: one pointer for each, dense and row-major, with the sizes in dims; sizes and
   * dtypes are the caller's to check.  One run at a time for each instance, others get TC_MODEL_BUSY. */
  int32_t (*run)(tc_instance *instance, const int64_t *dims, const void *const *inputs, void *const *outputs);

  /* Ends its threads and frees its memory; NULL is allowed. */
  void (*close)(tc_instance *instance);

  /* Since abi 2, may be NULL.  Memory in the arena for an input, which the caller fills before each run and gives to it:
   * the run uses it for other things once the input was read.  NULL where there is no room for it. */
  void *(*input_memory)(tc_instance *instance, uint32_t input);
} tc_model;

/* The engine of this library or executable; never NULL. */
const tc_model *toolchain_model(void);

#ifdef __cplusplus
}
#endif
#endif
