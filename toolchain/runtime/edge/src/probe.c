/* Runs the engine that it is linked with once: sizes of the dimensions in the arguments, inputs one after the other on
 * standard input, outputs on standard output.  For checks of code for other processors under emulation; not shipped. */
#include <stdio.h>
#include <stdlib.h>

#include "toolchain_model.h"

static size_t bytes_of(int32_t dtype, int32_t rank, const int64_t *shape) {
  size_t bytes = tc_item_size(dtype);
  for (int32_t i = 0; i < rank; i++) bytes *= (size_t)shape[i];
  return bytes;
}

int main(int count, char **arguments) {
  const tc_model *model = toolchain_model();
  if ((uint32_t)count != model->num_dims + 1) return 2;
  int64_t *dims = calloc(model->num_dims + 1, sizeof *dims);
  void **inputs = calloc(model->num_inputs + 1, sizeof *inputs);
  void **outputs = calloc(model->num_outputs + 1, sizeof *outputs);
  size_t *sizes = calloc(model->num_outputs + 1, sizeof *sizes);
  if (!dims || !inputs || !outputs || !sizes) return 3;
  for (uint32_t i = 0; i < model->num_dims; i++) dims[i] = strtoll(arguments[i + 1], NULL, 10);
  int64_t shape[64];
  for (uint32_t i = 0; i < model->num_inputs; i++) {
    const tc_tensor *tensor = &model->inputs[i];
    for (int32_t axis = 0; axis < tensor->rank; axis++)
      shape[axis] = tensor->shape[axis] >= 0 ? tensor->shape[axis] : dims[-(tensor->shape[axis] + 1)];
    const size_t bytes = bytes_of(tensor->dtype, tensor->rank, shape);
    inputs[i] = malloc(bytes + 1);
    if (inputs[i] == NULL || fread(inputs[i], 1, bytes, stdin) != bytes) return 4;
  }
  for (uint32_t i = 0; i < model->num_outputs; i++) {
    const tc_tensor *tensor = &model->outputs[i];
    model->output_shape(i, dims, shape);
    sizes[i] = bytes_of(tensor->dtype, tensor->rank, shape);
    outputs[i] = malloc(sizes[i] + 1);
    if (outputs[i] == NULL) return 3;
  }
  tc_instance *instance;
  int32_t status = model->open(1, &instance);
  if (status == TC_MODEL_OK) status = model->run(instance, dims, (const void *const *)inputs, outputs);
  if (status != TC_MODEL_OK) return 10 + status;
  for (uint32_t i = 0; i < model->num_outputs; i++)
    if (fwrite(outputs[i], 1, sizes[i], stdout) != sizes[i]) return 5;
  model->close(instance);
  return fflush(stdout) ? 5 : 0;
}
