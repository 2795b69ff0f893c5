/* Engines compiled ahead of time: a library, or an object linked into this executable (toolchain_model.h). */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define UNBOUND UINT32_MAX

typedef const tc_model *(*model_function)(void);

/* Which of the contract's tensors a model's is: by name, or by position where the compiler had to change names. */
static bool find(const char *name, const tcr_tensor *specs, uint32_t count, uint32_t *index) {
  for (*index = 0; *index < count; ++*index)
    if (strcmp(specs[*index].name, name) == 0) return true;
  return false;
}

static bool match(const tc_tensor *tensors, uint32_t count, const tcr_tensor *specs, uint32_t num_specs,
                  uint32_t *index) {
  bool named = true;
  for (uint32_t i = 0; i < count && named; i++) named = find(tensors[i].name, specs, num_specs, &index[i]);
  if (named) return true;
  for (uint32_t i = 0; i < count; i++) index[i] = i;
  return count == num_specs;
}

/* An axis of a model's input against the contract's; binds the model's dimension to the contract's. */
static bool bind_axis(tcr_engine *engine, int64_t have, int64_t want) {
  if (want >= 0) return have == want;
  uint32_t dim = (uint32_t)(-(want + 1));
  const tcr_dim *range = &engine->contract->dims[dim];
  if (engine->fixed[dim] != 0) return have == engine->fixed[dim];
  if (have >= 0) return range->min == have && range->max == have;
  uint32_t *bound = &engine->dim_of[-(have + 1)];
  if (*bound == UNBOUND) *bound = dim;
  return *bound == dim;
}

static bool bind_input(tcr_engine *engine, const tc_tensor *tensor, const tcr_tensor *spec) {
  if (tensor->dtype != spec->dtype || tensor->rank != spec->rank) return false;
  for (int32_t axis = 0; axis < spec->rank; axis++) {
    if (tensor->shape[axis] < -(int64_t)engine->model->num_dims) return false;
    if (!bind_axis(engine, tensor->shape[axis], spec->shape[axis])) return false;
  }
  return true;
}

static int32_t bind_all(tcr_engine *engine, const char *name, tcr_problem *problem) {
  const tc_model *model = engine->model;
  const tcr_contract *contract = engine->contract;
  if (!match(model->inputs, model->num_inputs, contract->inputs, contract->num_inputs, engine->input_of) ||
      model->num_outputs != contract->num_outputs ||
      !match(model->outputs, model->num_outputs, contract->outputs, contract->num_outputs, engine->output_of))
    return tcr_damaged(problem, name, "takes %u inputs and gives %u outputs, its contract names %u and %u",
                       model->num_inputs, model->num_outputs, contract->num_inputs, contract->num_outputs);
  for (uint32_t i = 0; i < model->num_dims; i++) engine->dim_of[i] = UNBOUND;
  for (uint32_t i = 0; i < model->num_inputs; i++)
    if (!bind_input(engine, &model->inputs[i], &contract->inputs[engine->input_of[i]]))
      return tcr_damaged(problem, name, "its input %s is not as its contract says", model->inputs[i].name);
  for (uint32_t i = 0; i < model->num_outputs; i++) {
    const tcr_tensor *spec = &contract->outputs[engine->output_of[i]];
    if (model->outputs[i].dtype != spec->dtype || model->outputs[i].rank != spec->rank)
      return tcr_damaged(problem, name, "its output %s is not as its contract says", model->outputs[i].name);
  }
  for (uint32_t i = 0; i < model->num_dims; i++)
    if (engine->dim_of[i] == UNBOUND)
      return tcr_damaged(problem, name, "no input has its dimension %s", model->dims[i].name);
  return TC_OK;
}

static int32_t of_model_status(int32_t got, tcr_problem *problem) {
  switch (got) {
    case TC_MODEL_OK: return TC_OK;
    case TC_MODEL_NO_MEMORY:
      return tcr_fail(problem, TC_NO_MEMORY, "engine", "give the process more memory, or take fewer threads",
                      "there is not enough memory for its arena, or no more threads are allowed");
    case TC_MODEL_BAD_SIZE:
      return tcr_fail(problem, TC_BAD_INPUT, "inputs", "", "the engine was not compiled for these sizes");
    case TC_MODEL_BUSY: return tcr_fail(problem, TC_BUSY, "engine", "", "another thread is running it");
    default: return tcr_fail(problem, TC_FAILED, "engine", "", "it failed on these inputs (status %d)", got);
  }
}

static int32_t load(tcr_engine *engine, const char *path, const char *name, tcr_problem *problem) {
  int32_t status = tcr_check_library(path, name, problem);
  if (status != TC_OK) return status;
  engine->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (engine->library == NULL) {
    const char *reason = dlerror();
    return tcr_fail(problem, TC_DAMAGED_BUNDLE, name, "", "cannot be loaded: %s", reason == NULL ? "?" : reason);
  }
  /* What POSIX asks for in place of a cast from an object pointer. */
  model_function function = NULL;
  void *symbol = dlsym(engine->library, "toolchain_model");
  memcpy(&function, &symbol, sizeof function);
  if (function == NULL)
    return tcr_fail(problem, TC_NO_ENGINE, name, "build the bundle with engines ahead of time",
                    "is no engine compiled ahead of time (it has no toolchain_model)");
  engine->model = function();
  return TC_OK;
}

static int32_t aot_open(tcr_engine *engine, const char *path, const char *name, tcr_problem *problem) {
  int32_t status = engine->model == NULL ? load(engine, path, name, problem) : TC_OK;
  if (status != TC_OK) return status;
  const tc_model *model = engine->model;
  if (model->abi < 1 || model->abi > TC_MODEL_ABI)
    return tcr_fail(problem, TC_NO_ENGINE, name, "use the runtime inside the bundle",
                    "is an engine of interface %u, this runtime takes up to %u", model->abi, TC_MODEL_ABI);
  engine->input_of = calloc((size_t)model->num_inputs + 1, sizeof *engine->input_of);
  engine->output_of = calloc((size_t)model->num_outputs + 1, sizeof *engine->output_of);
  engine->dim_of = calloc((size_t)model->num_dims + 1, sizeof *engine->dim_of);
  engine->dims = calloc((size_t)model->num_dims + 1, sizeof *engine->dims);
  engine->in = calloc((size_t)model->num_inputs + 1, sizeof *engine->in);
  engine->out = calloc((size_t)model->num_outputs + 1, sizeof *engine->out);
  if (!engine->input_of || !engine->output_of || !engine->dim_of || !engine->dims || !engine->in || !engine->out)
    return tcr_no_memory(problem, model->num_inputs + model->num_outputs, "the engine's inputs and outputs");
  status = bind_all(engine, name, problem);
  if (status != TC_OK) return status;
  return of_model_status(model->open(engine->threads, &engine->instance), problem);
}

static void set_dims(const tcr_engine *engine, const int64_t *sizes) {
  for (uint32_t i = 0; i < engine->model->num_dims; i++) engine->dims[i] = sizes[engine->dim_of[i]];
}

static void aot_output_shape(const tcr_engine *engine, uint32_t output, const int64_t *sizes, int64_t *shape) {
  set_dims(engine, sizes);
  for (uint32_t i = 0; i < engine->model->num_outputs; i++)
    if (engine->output_of[i] == output) engine->model->output_shape(i, engine->dims, shape);
}

static int32_t aot_run(tcr_engine *engine, const int64_t *sizes, const void *const *inputs, void *const *outputs,
                       tcr_problem *problem) {
  const tc_model *model = engine->model;
  set_dims(engine, sizes);
  for (uint32_t i = 0; i < model->num_inputs; i++) engine->in[i] = inputs[engine->input_of[i]];
  for (uint32_t i = 0; i < model->num_outputs; i++) engine->out[i] = outputs[engine->output_of[i]];
  return of_model_status(model->run(engine->instance, engine->dims, engine->in, engine->out), problem);
}

static void *aot_input_memory(const tcr_engine *engine, uint32_t input) {
  const tc_model *model = engine->model;
  if (model->abi < 2 || model->input_memory == NULL) return NULL;
  for (uint32_t i = 0; i < model->num_inputs; i++)
    if (engine->input_of[i] == input) return model->input_memory(engine->instance, i);
  return NULL;
}

static void aot_close(tcr_engine *engine) {
  if (engine->instance != NULL) engine->model->close(engine->instance);
  free(engine->input_of);
  free(engine->output_of);
  free(engine->dim_of);
  free(engine->dims);
  free(engine->in);
  free(engine->out);
  if (engine->library != NULL) dlclose(engine->library);
}

const tcr_engine_ops tcr_aot = {"aot", aot_open, aot_output_shape, aot_run, aot_close, aot_input_memory, NULL};
