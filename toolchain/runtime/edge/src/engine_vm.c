/* Engines of TVM's virtual machine: for models with sizes that only a run tells, and whatever else no plan can hold.
 *
 * Calls of TVM's C interface end with a status; its exceptions stay inside. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tvm_api.h"

#define WHY 512
#define UNNAMED UINT32_MAX

struct tcr_machine {
  void *module, *main, *item, *length; /* functions, but for the module */
  uint32_t *order; /* which of the contract's inputs each parameter is */
  tvm_any *arguments, *values; /* values: one for each output of the last run */
  uint32_t num_values;
};

/* TVM keeps a pool of threads for each thread that runs something. */
static _Thread_local int32_t threads_of_pool;

static tvm_any integer(int64_t value) { return (tvm_any){TVM_INT, 0, {.integer = value}}; }
static tvm_any text_of(const char *text) { return (tvm_any){TVM_TEXT, 0, {.text = text}}; }
static tvm_any object_of(int32_t type, void *object) { return (tvm_any){type, 0, {.object = object}}; }

/* A module's function of that name; NULL: there is none, and why says it. */
static void *function_of(void *module, const char *name, char *why) {
  tvm_any arguments[] = {object_of(((tvm_object *)module)->type, module), text_of(name), {TVM_BOOL, 0, {.integer = 1}}};
  tvm_any result;
  if (!tcr_tvm_call_global("ffi.ModuleGetFunction", arguments, 3, &result, why, WHY)) return NULL;
  if (result.type == TVM_FUNCTION) return result.as.object;
  tcr_tvm_drop(&result);
  snprintf(why, WHY, "it has no function %s", name);
  return NULL;
}

static bool call_method(void *module, const char *name, tvm_any *arguments, int32_t count, tvm_any *result, char *why) {
  void *function = function_of(module, name, why);
  if (function == NULL) return false;
  const bool good = tcr_tvm_call(function, arguments, count, result, why, WHY);
  tvm_any done = object_of(TVM_FUNCTION, function);
  tcr_tvm_drop(&done);
  return good;
}

/* The machine over the library at path. */
static bool start(struct tcr_machine *machine, const char *path, char *why) {
  tvm_any from[] = {text_of(path), text_of("so")}, library, module, nothing;
  tvm_any place[] = {integer(TVM_CPU), integer(0), integer(TVM_POOLED)};
  if (!tcr_tvm_call_global("ffi.Module.load_from_file.so", from, 2, &library, why, WHY)) return false;
  const bool loaded = call_method(library.as.object, "vm_load_executable", NULL, 0, &module, why);
  tcr_tvm_drop(&library);
  if (!loaded) return false;
  machine->module = module.as.object;
  if (!call_method(machine->module, "vm_initialization", place, 3, &nothing, why)) return false;
  tcr_tvm_drop(&nothing);
  machine->main = function_of(machine->module, "main", why);
  return machine->main != NULL && tcr_tvm_global("ffi.ArrayGetItem", &machine->item, why, WHY) &&
         tcr_tvm_global("ffi.ArraySize", &machine->length, why, WHY);
}

/* The contract's input that a parameter is, by its name; UNNAMED: none. */
static bool input_named(const tcr_engine *engine, uint32_t parameter, uint32_t *index, char *why) {
  tvm_any arguments[] = {text_of("main"), integer(parameter)}, name;
  if (!call_method(engine->machine->module, "get_function_param_name", arguments, 2, &name, why)) return false;
  tvm_bytes bytes = {name.as.bytes, name.length};
  if (name.type == TVM_STRING) memcpy(&bytes, (const char *)name.as.object + sizeof(tvm_object), sizeof bytes);
  *index = UNNAMED;
  for (uint32_t i = 0; i < engine->contract->num_inputs; i++)
    if (strlen(engine->contract->inputs[i].name) == bytes.size &&
        memcmp(engine->contract->inputs[i].name, bytes.data, bytes.size) == 0)
      *index = i;
  tcr_tvm_drop(&name);
  return true;
}

/* By name, or by position where the compiler had to change names. */
static int32_t find_order(tcr_engine *engine, const char *name, char *why, tcr_problem *problem) {
  struct tcr_machine *machine = engine->machine;
  const uint32_t count = engine->contract->num_inputs;
  tvm_any main = text_of("main"), arity;
  if (!call_method(machine->module, "get_function_arity", &main, 1, &arity, why))
    return tcr_fail(problem, TC_DAMAGED_BUNDLE, name, "", "TVM cannot load it: %s", why);
  if (arity.as.integer != count)
    return tcr_damaged(problem, name, "takes %lld inputs, its contract names %u", (long long)arity.as.integer, count);
  bool named = true;
  for (uint32_t i = 0; i < count && named; i++) {
    if (!input_named(engine, i, &machine->order[i], why))
      return tcr_fail(problem, TC_DAMAGED_BUNDLE, name, "", "TVM cannot load it: %s", why);
    named = machine->order[i] != UNNAMED;
  }
  for (uint32_t i = 0; i < count && !named; i++) machine->order[i] = i;
  return TC_OK;
}

static int32_t vm_open(tcr_engine *engine, const char *path, const char *name, tcr_problem *problem) {
  char why[WHY] = "";
  const tcr_contract *contract = engine->contract;
  struct tcr_machine *machine = engine->machine = calloc(1, sizeof *machine);
  if (machine == NULL) return tcr_no_memory(problem, sizeof *machine, "the engine");
  machine->order = calloc((size_t)contract->num_inputs + 1, sizeof *machine->order);
  machine->arguments = calloc((size_t)contract->num_inputs + 1, sizeof *machine->arguments);
  machine->values = calloc((size_t)contract->num_outputs + 1, sizeof *machine->values);
  if (!machine->order || !machine->arguments || !machine->values)
    return tcr_no_memory(problem, contract->num_inputs + contract->num_outputs, "the engine's inputs and outputs");
  int32_t status = tcr_check_library(path, name, problem);
  if (status == TC_OK) status = tcr_tvm_load(engine->layout, engine->threads, problem);
  if (status != TC_OK) return status;
  if (!start(machine, path, why))
    return tcr_fail(problem, TC_DAMAGED_BUNDLE, name, "", "TVM cannot load it: %s", why);
  return find_order(engine, name, why, problem);
}

static void vm_output_shape(const tcr_engine *engine, uint32_t output, const int64_t *sizes, int64_t *shape) {
  const tcr_tensor *spec = &engine->contract->outputs[output];
  for (int32_t axis = 0; axis < spec->rank; axis++) {
    const int64_t size = spec->shape[axis];
    shape[axis] = size >= 0 || size == TC_UNKNOWN_SIZE ? size : sizes[-(size + 1)];
    if (shape[axis] < 0) shape[axis] = TC_UNKNOWN_SIZE; /* a dimension that no input has */
  }
}

static int32_t set_threads(int32_t threads, tcr_problem *problem) {
  const int32_t count = threads > 0 ? threads : tcr_tvm_processors();
  tvm_any arguments[] = {integer(1), integer(count)}, nothing, got;
  char why[WHY];
  if (threads_of_pool == count) return TC_OK;
  if (!tcr_tvm_call_global("runtime.config_threadpool", arguments, 2, &nothing, why, WHY) ||
      !tcr_tvm_call_global("runtime.NumThreads", NULL, 0, &got, why, WHY))
    return tcr_fail(problem, TC_FAILED, "threads", "", "%s", why);
  if (got.as.integer != count)
    return tcr_fail(problem, TC_USAGE, "threads", "set TVM_NUM_THREADS to it before the process starts",
                    "TVM was started with at most %lld threads in this process, got %d", (long long)got.as.integer,
                    count);
  threads_of_pool = count;
  return TC_OK;
}

/* A tensor over an input; of memory that is not aligned, over a copy. */
static bool tensor_of(const tcr_engine *engine, uint32_t input, const int64_t *sizes, const void *data, tvm_any *result,
                      char *why) {
  const tcr_tensor *spec = &engine->contract->inputs[input];
  const bool copied = ((uintptr_t)data & (TC_ALIGNMENT - 1)) != 0;
  int64_t shape[TC_MAX_RANK] = {0};
  void *memory;
  size_t bytes = 0;
  for (int32_t axis = 0; axis < spec->rank; axis++)
    shape[axis] = spec->shape[axis] < 0 ? sizes[-(spec->shape[axis] + 1)] : spec->shape[axis];
  tcr_bytes_of(spec->dtype, spec->rank, shape, &bytes);
  if (!tcr_tvm_make(spec->dtype, spec->rank, shape, copied ? NULL : data, result, &memory, why, WHY)) return false;
  if (copied) memcpy(memory, data, bytes);
  return true;
}

/* Keeps the tensors of a result, which may be lists inside lists, in order. */
static bool keep(const tcr_engine *engine, tvm_any *value, char *why) {
  struct tcr_machine *machine = engine->machine;
  tvm_any count, item;
  if (value->type == TVM_TENSOR && machine->num_values < engine->contract->num_outputs) {
    machine->values[machine->num_values++] = *value;
    return true;
  }
  const bool list = value->type == TVM_ARRAY;
  snprintf(why, WHY, "it gave more than %u outputs, or other things than arrays", engine->contract->num_outputs);
  bool good = list && tcr_tvm_call(machine->length, value, 1, &count, why, WHY);
  for (int64_t i = 0; good && i < count.as.integer; i++) {
    tvm_any arguments[] = {*value, integer(i)};
    good = tcr_tvm_call(machine->item, arguments, 2, &item, why, WHY) && keep(engine, &item, why);
  }
  tcr_tvm_drop(value);
  return good;
}

static void drop_values(struct tcr_machine *machine) {
  for (uint32_t i = 0; i < machine->num_values; i++) tcr_tvm_drop(&machine->values[i]);
  machine->num_values = 0;
}

/* An output's array as it is, which must be a dense one. */
static int32_t check_output(const tcr_engine *engine, uint32_t output, const int64_t *expected, tvm_array *array,
                            tcr_problem *problem) {
  const tcr_tensor *spec = &engine->contract->outputs[output];
  const tvm_tensor *tensor = engine->machine->values[output].as.object;
  *array = tensor->array;
  bool good = tcr_tvm_dtype(array) == spec->dtype && array->rank == spec->rank && tcr_tvm_is_dense(array);
  for (int32_t axis = 0; good && axis < spec->rank; axis++)
    good = expected[axis] < 0 || array->shape[axis] == expected[axis];
  if (good) return TC_OK;
  return tcr_damaged(problem, "engine", "gives output '%s' not as its contract says", spec->name);
}

static int32_t vm_take(const tcr_engine *engine, uint32_t output, int64_t *shape, void *to, size_t room, size_t *bytes,
                       tcr_problem *problem) {
  const tcr_tensor *spec = &engine->contract->outputs[output];
  tvm_array array;
  int64_t expected[TC_MAX_RANK];
  vm_output_shape(engine, output, engine->effective, expected);
  int32_t status = check_output(engine, output, expected, &array, problem);
  if (status != TC_OK) return status;
  if (spec->rank) memcpy(shape, array.shape, (size_t)spec->rank * sizeof *shape);
  if (!tcr_bytes_of(spec->dtype, spec->rank, shape, bytes)) return tcr_no_memory(problem, UINT64_MAX, spec->name);
  if (*bytes <= room && *bytes) memcpy(to, (const char *)array.data + array.offset, *bytes);
  return TC_OK;
}

static int32_t vm_run(tcr_engine *engine, const int64_t *sizes, const void *const *inputs, void *const *outputs,
                      tcr_problem *problem) {
  struct tcr_machine *machine = engine->machine;
  char why[WHY] = "";
  tvm_any result;
  int64_t shape[TC_MAX_RANK];
  uint32_t made = 0;
  drop_values(machine);
  const int32_t ready = set_threads(engine->threads, problem);
  if (ready != TC_OK) return ready;
  bool good = true;
  for (; good && made < engine->contract->num_inputs; made += good)
    good = tensor_of(engine, machine->order[made], sizes, inputs[machine->order[made]], &machine->arguments[made], why);
  good = good && tcr_tvm_call(machine->main, machine->arguments, (int32_t)made, &result, why, WHY);
  for (uint32_t i = 0; i < made; i++) tcr_tvm_drop(&machine->arguments[i]);
  good = good && keep(engine, &result, why);
  if (!good) return tcr_fail(problem, TC_FAILED, "engine", "", "it failed on these inputs: %s", why);
  if (machine->num_values != engine->contract->num_outputs)
    return tcr_damaged(problem, "engine", "gave %u outputs, its contract names %u", machine->num_values,
                       engine->contract->num_outputs);
  for (uint32_t i = 0; i < machine->num_values; i++) {
    size_t bytes = 0, room = 0;
    const tcr_tensor *spec = &engine->contract->outputs[i];
    int64_t known[TC_MAX_RANK];
    vm_output_shape(engine, i, sizes, known);
    /* Memory of unknown size is filled by whoever knows how much there is. */
    if (!tcr_bytes_of(spec->dtype, spec->rank, known, &room)) room = 0;
    const int32_t status = vm_take(engine, i, shape, outputs[i], room, &bytes, problem);
    if (status != TC_OK) return status;
  }
  return TC_OK;
}

static void vm_close(tcr_engine *engine) {
  struct tcr_machine *machine = engine->machine;
  if (machine == NULL) return;
  if (machine->values != NULL) drop_values(machine);
  void *const objects[] = {machine->main, machine->item, machine->length, machine->module};
  for (size_t i = 0; i < sizeof objects / sizeof *objects; i++)
    if (objects[i] != NULL) tcr_tvm_api()->release(objects[i]);
  free(machine->order);
  free(machine->arguments);
  free(machine->values);
  free(machine);
}

const tcr_engine_ops tcr_vm = {"vm", vm_open, vm_output_shape, vm_run, vm_close, NULL, vm_take};
