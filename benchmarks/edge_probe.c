/* Runs the engine that it is linked with some times, on one thread, at fixed sizes: edge_probe RUNS. */
#include <stdio.h>
#include <stdlib.h>

#include "edge_fill.h"
#include "toolchain_model.h"

#define ALIGNMENT 64

static void *memory_for(int32_t dtype, int32_t rank, const int64_t *shape) {
  size_t count = 1;
  for (int32_t i = 0; i < rank; i++) count *= (size_t)shape[i];
  void *memory = aligned_alloc(ALIGNMENT, (count * tc_item_size(dtype) / ALIGNMENT + 1) * ALIGNMENT);
  if (memory != NULL) fill(memory, count, tc_item_size(dtype), dtype == TC_FLOAT32);
  return memory;
}

int main(int count, char **arguments) {
  const tc_model *model = toolchain_model();
  const void *inputs[16];
  void *outputs[16];
  int64_t shape[64];
  if (count != 2 || model->num_dims || model->num_inputs > 16 || model->num_outputs > 16) return 2;
  for (uint32_t i = 0; i < model->num_inputs; i++) {
    const tc_tensor *tensor = &model->inputs[i];
    inputs[i] = memory_for(tensor->dtype, tensor->rank, tensor->shape);
    if (inputs[i] == NULL) return 3;
  }
  for (uint32_t i = 0; i < model->num_outputs; i++) {
    const tc_tensor *tensor = &model->outputs[i];
    model->output_shape(i, NULL, shape);
    outputs[i] = memory_for(tensor->dtype, tensor->rank, shape);
    if (outputs[i] == NULL) return 3;
  }
  tc_instance *instance;
  if (model->open(1, &instance) != TC_MODEL_OK) return 4;
  for (int run = atoi(arguments[1]); run > 0; run--)
    if (model->run(instance, NULL, inputs, outputs) != TC_MODEL_OK) return 5;
  model->close(instance);
  return 0;
}
