/* An engine: its instances, their memory, and runs of the plan. */
#include "engine.h"

#include <stdatomic.h>
#include <stdlib.h>

typedef struct block {
  void *memory; /* as malloc gave it */
  uint8_t *start; /* aligned in it */
  uint64_t capacity;
} block;

struct tc_instance {
  atomic_flag running;
  tc_threads *threads;
  block arena;
  block staging; /* copies of what the caller gave unaligned */
  int planned;       /* whether dims, sizes and offsets hold a plan */
  uint64_t arena_bytes;
  int64_t *dims;
  uint64_t *offsets;      /* of buffers, then of staged inputs and outputs */
  uint64_t *sizes;        /* of buffers, inputs and outputs */
  const void **inputs;    /* what the kernels get */
  void **outputs;
};

static uint64_t aligned(uint64_t size) { return (size + (TC_ALIGNMENT - 1)) & ~(uint64_t)(TC_ALIGNMENT - 1); }

static uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* Places buffers so that those that live at once do not overlap: the largest first, each at the lowest free offset.
 * The same as place() of toolchain/tvm/aot/arena.py, where its source is named; n is some hundreds. */
static uint64_t place(uint32_t n, const uint32_t *first, const uint32_t *last, const uint64_t *size, uint64_t *offset,
                      uint32_t *order) {
  uint64_t total = 0;
  for (uint32_t i = 0; i < n; i++) { /* insertion sort, stable: largest first */
    uint32_t j = i;
    for (; j > 0 && size[order[j - 1]] < size[i]; j--) order[j] = order[j - 1];
    order[j] = i;
  }
  for (uint32_t k = 0; k < n; k++) {
    const uint32_t i = order[k];
    uint64_t at = 0;
    int moved = 1;
    while (moved) { /* past every placed neighbour that overlaps, until none does */
      moved = 0;
      for (uint32_t p = 0; p < k; p++) {
        const uint32_t o = order[p];
        if (first[o] > last[i] || first[i] > last[o]) continue;
        if (at < offset[o] + size[o] && offset[o] < at + size[i]) {
          at = aligned(offset[o] + size[o]);
          moved = 1;
        }
      }
    }
    offset[i] = at;
    total = larger(total, aligned(at + size[i]));
  }
  return total;
}

/* Sizes and offsets for these dimensions; keeps them for the next run with the same ones. */
static int32_t plan_for(tc_instance *instance, const int64_t *dims) {
  const tc_plan *plan = &tc_the_plan;
  const uint32_t n = plan->num_buffers;
  if (instance->planned && (plan->num_dims == 0 || !memcmp(instance->dims, dims, plan->num_dims * sizeof *dims)))
    return TC_MODEL_OK;
  for (uint32_t i = 0; i < plan->num_dims; i++)
    if (dims[i] < plan->dims[i].min || dims[i] > plan->dims[i].max) return TC_MODEL_BAD_SIZE;
  instance->planned = 0;
  plan->buffer_bytes(dims, instance->sizes);
  plan->input_bytes(dims, instance->sizes + n);
  plan->output_bytes(dims, instance->sizes + n + plan->num_inputs);
  if (plan->is_static) {
    instance->arena_bytes = plan->arena_bytes;
  } else {
    uint32_t *order = malloc((n + 1) * sizeof *order);
    if (order == NULL) return TC_MODEL_NO_MEMORY;
    instance->arena_bytes = place(n, plan->first, plan->last, instance->sizes, instance->offsets, order);
    free(order);
    memcpy(instance->dims, dims, plan->num_dims * sizeof *dims);
  }
  instance->planned = 1;
  return TC_MODEL_OK;
}

/* Lets the block hold bytes; what is in it is lost where it grows. */
static int32_t reserve(block *block, uint64_t bytes) {
  if (bytes <= block->capacity && block->memory != NULL) return TC_MODEL_OK;
  if (bytes > SIZE_MAX - TC_ALIGNMENT) return TC_MODEL_NO_MEMORY;
  free(block->memory);
  block->capacity = 0;
  block->memory = malloc((size_t)bytes + TC_ALIGNMENT);
  if (block->memory == NULL) return TC_MODEL_NO_MEMORY;
  block->start = tc_aligned(block->memory);
  block->capacity = bytes;
  return TC_MODEL_OK;
}

static int is_aligned(const void *pointer) { return ((uintptr_t)pointer & (TC_ALIGNMENT - 1)) == 0; }

/* Gives the kernels the caller's buffers, and memory of the instance's in place of those that are not aligned. */
static int32_t stage(tc_instance *instance, const void *const *inputs, void *const *outputs) {
  const tc_plan *plan = &tc_the_plan;
  const uint64_t *input_bytes = instance->sizes + plan->num_buffers;
  const uint64_t *output_bytes = input_bytes + plan->num_inputs;
  uint64_t total = 0;
  for (uint32_t i = 0; i < plan->num_inputs; i++)
    if (!is_aligned(inputs[i])) total = aligned(total) + input_bytes[i];
  for (uint32_t i = 0; i < plan->num_outputs; i++)
    if (!is_aligned(outputs[i])) total = aligned(total) + output_bytes[i];
  int32_t status = reserve(&instance->arena, instance->arena_bytes);
  if (status == TC_MODEL_OK && total > 0) status = reserve(&instance->staging, total);
  if (status != TC_MODEL_OK) return status;
  uint64_t at = 0;
  for (uint32_t i = 0; i < plan->num_inputs; i++) {
    instance->inputs[i] = inputs[i];
    if (is_aligned(inputs[i])) continue;
    at = aligned(at);
    memcpy(instance->staging.start + at, inputs[i], (size_t)input_bytes[i]);
    instance->inputs[i] = instance->staging.start + at;
    at += input_bytes[i];
  }
  for (uint32_t i = 0; i < plan->num_outputs; i++) {
    instance->outputs[i] = outputs[i];
    if (is_aligned(outputs[i])) continue;
    at = aligned(at);
    instance->outputs[i] = instance->staging.start + at;
    at += output_bytes[i];
  }
  return TC_MODEL_OK;
}

static int32_t run_once(tc_instance *instance, const int64_t *dims, const void *const *inputs, void *const *outputs) {
  const tc_plan *plan = &tc_the_plan;
  int32_t status = plan_for(instance, dims);
  if (status == TC_MODEL_OK) status = stage(instance, inputs, outputs);
  if (status != TC_MODEL_OK) return status;
  const tc_frame frame = {instance->inputs, instance->outputs, instance->arena.start, instance->offsets, dims};
  tc_threads_use(instance->threads);
  const int32_t failed = plan->run(&frame);
  tc_threads_use(NULL);
  if (failed) return TC_MODEL_FAILED;
  const uint64_t *output_bytes = instance->sizes + plan->num_buffers + plan->num_inputs;
  for (uint32_t i = 0; i < plan->num_outputs; i++)
    if (instance->outputs[i] != outputs[i]) memcpy(outputs[i], instance->outputs[i], (size_t)output_bytes[i]);
  return TC_MODEL_OK;
}

static int32_t run(tc_instance *instance, const int64_t *dims, const void *const *inputs, void *const *outputs) {
  if (atomic_flag_test_and_set_explicit(&instance->running, memory_order_acquire)) return TC_MODEL_BUSY;
  const int32_t status = run_once(instance, dims, inputs, outputs);
  atomic_flag_clear_explicit(&instance->running, memory_order_release);
  return status;
}

static void close_instance(tc_instance *instance) {
  if (instance == NULL) return;
  tc_threads_stop(instance->threads);
  free(instance->arena.memory);
  free(instance->staging.memory);
  free(instance->dims);
  free(instance->offsets);
  free(instance->sizes);
  free(instance->inputs);
  free(instance->outputs);
  free(instance);
}

static int32_t open_instance(int32_t threads, tc_instance **result) {
  const tc_plan *plan = &tc_the_plan;
  *result = NULL;
  tc_instance *instance = calloc(1, sizeof *instance);
  if (instance == NULL) return TC_MODEL_NO_MEMORY;
  atomic_flag_clear(&instance->running);
  const size_t parts = (size_t)plan->num_buffers + plan->num_inputs + plan->num_outputs + 1;
  instance->dims = calloc(plan->num_dims + 1, sizeof *instance->dims);
  instance->offsets = calloc(parts, sizeof *instance->offsets);
  instance->sizes = calloc(parts, sizeof *instance->sizes);
  instance->inputs = calloc(plan->num_inputs + 1, sizeof *instance->inputs);
  instance->outputs = calloc(plan->num_outputs + 1, sizeof *instance->outputs);
  instance->threads = tc_threads_start(threads);
  int32_t status = TC_MODEL_OK;
  if (!instance->dims || !instance->offsets || !instance->sizes || !instance->inputs || !instance->outputs ||
      !instance->threads)
    status = TC_MODEL_NO_MEMORY;
  if (status == TC_MODEL_OK && plan->is_static) status = reserve(&instance->arena, plan->arena_bytes);
  if (status != TC_MODEL_OK) {
    close_instance(instance);
    return status;
  }
  *result = instance;
  return TC_MODEL_OK;
}

/* Of static sizes alone: their arena stays where it is. */
static void *input_memory(tc_instance *instance, uint32_t input) {
  const tc_plan *plan = &tc_the_plan;
  if (plan->input_places == NULL || input >= plan->num_inputs) return NULL;
  return plan->input_places[input] == TC_NO_PLACE ? NULL : instance->arena.start + plan->input_places[input];
}

/* Bytes of the arena for these dimensions; 0 when there is no memory to find out. */
static uint64_t arena_bytes(const int64_t *dims) {
  const tc_plan *plan = &tc_the_plan;
  const uint32_t n = plan->num_buffers;
  if (plan->is_static) return plan->arena_bytes;
  uint64_t *sizes = malloc((2 * (size_t)n + 1) * sizeof *sizes);
  uint32_t *order = malloc(((size_t)n + 1) * sizeof *order);
  uint64_t total = 0;
  if (sizes != NULL && order != NULL) {
    plan->buffer_bytes(dims, sizes);
    total = place(n, plan->first, plan->last, sizes, sizes + n, order);
  }
  free(sizes);
  free(order);
  return total;
}

static void output_shape(uint32_t output, const int64_t *dims, int64_t *shape) {
  tc_the_plan.output_shape(output, dims, shape);
}

#if defined(__GNUC__)
__attribute__((visibility("default")))
#endif
const tc_model *toolchain_model(void) {
  static tc_model model;
  const tc_plan *plan = &tc_the_plan;
  /* Always the same values: threads that come here together write what is there already. */
  model.num_inputs = plan->num_inputs;
  model.num_outputs = plan->num_outputs;
  model.num_dims = plan->num_dims;
  model.inputs = plan->inputs;
  model.outputs = plan->outputs;
  model.dims = plan->dims;
  model.weight_bytes = plan->weight_bytes;
  model.output_shape = output_shape;
  model.arena_bytes = arena_bytes;
  model.open = open_instance;
  model.run = run;
  model.close = close_instance;
  model.input_memory = input_memory;
  model.abi = TC_MODEL_ABI;
  return &model;
}
