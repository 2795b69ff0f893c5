/* Between engine.c and the plan that the compiler writes for a model.  Not installed. */
#ifndef TC_ENGINE_H
#define TC_ENGINE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "toolchain_model.h"

/* What a run works on. */
typedef struct tc_frame {
  const void *const *inputs;
  void *const *outputs;
  uint8_t *arena;
  const uint64_t *offsets; /* of each buffer in the arena; NULL when the plan holds them */
  const int64_t *dims;
} tc_frame;

#define TC_NO_PLACE UINT64_MAX

/* A model, as the compiler writes it. */
typedef struct tc_plan {
  uint32_t num_inputs, num_outputs, num_dims, num_buffers;
  const tc_tensor *inputs;
  const tc_tensor *outputs;
  const tc_dim *dims;
  const uint32_t *first; /* first and last step of each buffer; NULL for static sizes */
  const uint32_t *last;
  uint64_t weight_bytes;
  uint64_t arena_bytes; /* for static sizes */
  int32_t is_static;
  void (*input_bytes)(const int64_t *dims, uint64_t *bytes);
  void (*output_bytes)(const int64_t *dims, uint64_t *bytes);
  void (*buffer_bytes)(const int64_t *dims, uint64_t *bytes);
  void (*output_shape)(uint32_t output, const int64_t *dims, int64_t *shape);
  int32_t (*run)(const tc_frame *frame);
  const uint64_t *input_places; /* offsets in the arena that are free while each input is read; NULL: unknown */
} tc_plan;

extern const tc_plan tc_the_plan;
extern const uint8_t tc_weights[];

/* Kernels take every pointer as void *; which ones they only read is the compiler's to know. */
#define TC_INPUT(i) ((void *)(uintptr_t)f->inputs[i])
#define TC_OUTPUT(i) (f->outputs[i])
#define TC_ARENA(offset) ((void *)(f->arena + (offset)))
#define TC_BUFFER(i) ((void *)(f->arena + f->offsets[i]))
#define TC_WEIGHT(offset) ((void *)(uintptr_t)(tc_weights + (offset)))

static inline int64_t tc_floor_div(int64_t a, int64_t b) {
  int64_t quotient = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}
static inline int64_t tc_floor_mod(int64_t a, int64_t b) { return a - tc_floor_div(a, b) * b; }
static inline int64_t tc_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t tc_max(int64_t a, int64_t b) { return a > b ? a : b; }

/* The first aligned address at or after memory, which was asked for with TC_ALIGNMENT bytes more. */
static inline uint8_t *tc_aligned(void *memory) {
  return (uint8_t *)(((uintptr_t)memory + (TC_ALIGNMENT - 1)) & ~(uintptr_t)(TC_ALIGNMENT - 1));
}

/* Threads (threads.c). */
typedef struct tc_threads tc_threads;

/* Starts count - 1 threads beside the caller's; 0: one for each processor that the process may use.  NULL: no memory,
 * or the system gives no more threads. */
tc_threads *tc_threads_start(int32_t count);
void tc_threads_stop(tc_threads *threads);

/* Memory that the next kernel may work in on this thread, which runs the plan. */
void tc_threads_workspace(void *memory, uint64_t bytes);

/* Lets the kernels that this thread calls next use these threads; NULL ends it. */
void tc_threads_use(tc_threads *threads);

#endif
