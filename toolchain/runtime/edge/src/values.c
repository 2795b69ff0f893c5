/* The caller's arrays against the contract. */
#include <stdio.h>
#include <string.h>

#include "internal.h"

/* "the model takes image: float32[batch, 4]" */
static void signature(const tcr_contract *contract, bool outputs, char *hint, size_t bytes) {
  tcr_text text = {hint, bytes, 0};
  uint32_t count = outputs ? contract->num_outputs : contract->num_inputs;
  const tcr_tensor *specs = outputs ? contract->outputs : contract->inputs;
  tcr_append(&text, outputs ? "the model gives " : "the model takes ");
  for (uint32_t i = 0; i < count; i++) {
    tcr_append(&text, "%s%s: %s", i ? ", " : "", specs[i].name, tcr_dtype_name(specs[i].dtype));
    tcr_shape_text(&text, specs[i].rank, specs[i].shape, contract);
  }
}

/* Which tensor a value is meant for. */
static int32_t find(const tcr_contract *contract, const tc_value *value, uint32_t position, bool output,
                    uint32_t *index, tcr_problem *problem) {
  char hint[400];
  uint32_t count = output ? contract->num_outputs : contract->num_inputs;
  const tcr_tensor *specs = output ? contract->outputs : contract->inputs;
  *index = position;
  if (value->name == NULL && position < count) return TC_OK;
  for (*index = 0; value->name != NULL && *index < count; ++*index)
    if (strcmp(specs[*index].name, value->name) == 0) return TC_OK;
  signature(contract, output, hint, sizeof hint);
  return tcr_fail(problem, TC_BAD_INPUT, output ? "outputs" : "inputs", hint, "unknown %s '%.100s'",
                  output ? "output" : "input", value->name == NULL ? "(a further one)" : value->name);
}

static int32_t check_size(const tcr_contract *contract, const tcr_tensor *spec, int32_t axis, int64_t got,
                          int64_t *sizes, const char *hint, tcr_problem *problem) {
  if (spec->shape[axis] >= 0) {
    if (got == spec->shape[axis]) return TC_OK;
    return tcr_fail(problem, TC_BAD_INPUT, "inputs", hint, "input '%s' axis %d must have size %lld, got %lld",
                    spec->name, axis, (long long)spec->shape[axis], (long long)got);
  }
  uint32_t index = (uint32_t)(-(spec->shape[axis] + 1));
  const tcr_dim *dim = &contract->dims[index];
  if (got < 0 || got < dim->min || got > dim->max) {
    char range[64];
    if (dim->max == INT64_MAX)
      snprintf(range, sizeof range, "of at least %lld", (long long)dim->min);
    else
      snprintf(range, sizeof range, "from %lld to %lld", (long long)dim->min, (long long)dim->max);
    return tcr_fail(problem, TC_BAD_INPUT, "inputs", hint, "input '%s' axis %d (%s) must have a size %s, got %lld",
                    spec->name, axis, dim->name, range, (long long)got);
  }
  if (sizes[index] >= 0 && sizes[index] != got)
    return tcr_fail(problem, TC_BAD_INPUT, "inputs", hint,
                    "input '%s' axis %d (%s) has size %lld, but another one has %lld", spec->name, axis, dim->name,
                    (long long)got, (long long)sizes[index]);
  sizes[index] = got;
  return TC_OK;
}

/* Element index as a whole number; the array may lie at any address. A uint64 beyond int64 is its largest. */
static int64_t whole_at(int32_t dtype, const char *data, size_t index) {
#define CASE(code, type) \
  case code: { \
    type element; \
    memcpy(&element, data + index * sizeof element, sizeof element); \
    return (int64_t)element; \
  }
  switch (dtype) {
    CASE(TC_INT8, int8_t)
    CASE(TC_INT16, int16_t)
    CASE(TC_INT32, int32_t)
    CASE(TC_INT64, int64_t)
    CASE(TC_UINT8, uint8_t)
    CASE(TC_UINT16, uint16_t)
    CASE(TC_UINT32, uint32_t)
    case TC_UINT64: {
      uint64_t element;
      memcpy(&element, data + index * sizeof element, sizeof element);
      return element > INT64_MAX ? INT64_MAX : (int64_t)element;
    }
  }
#undef CASE
  return 0;
}

/* Values of whole numbers against the range that the contract declares. */
static int32_t check_range(const tcr_tensor *spec, const tc_value *value, const char *hint, tcr_problem *problem) {
  char allowed[64];
  int64_t count = 1;
  if (spec->low == INT64_MIN && spec->high == INT64_MAX) return TC_OK;
  for (int32_t axis = 0; axis < value->rank; axis++) count *= value->shape[axis];
  for (int64_t i = 0; i < count; i++) {
    int64_t got = whole_at(value->dtype, value->data, (size_t)i);
    if (got >= spec->low && got <= spec->high) continue;
    if (spec->low == INT64_MIN)
      snprintf(allowed, sizeof allowed, "to %lld", (long long)spec->high);
    else if (spec->high == INT64_MAX)
      snprintf(allowed, sizeof allowed, "from %lld", (long long)spec->low);
    else
      snprintf(allowed, sizeof allowed, "from %lld to %lld", (long long)spec->low, (long long)spec->high);
    return tcr_fail(problem, TC_BAD_INPUT, "inputs", hint, "input '%s' must hold values %s, got %lld at element %lld",
                    spec->name, allowed, (long long)got, (long long)i);
  }
  return TC_OK;
}

static int32_t check_value(const tcr_contract *contract, const tcr_tensor *spec, const tc_value *value, int64_t *sizes,
                           bool data, tcr_problem *problem) {
  char hint[400];
  size_t bytes;
  int32_t status = TC_OK;
  signature(contract, false, hint, sizeof hint);
  if (value->dtype != spec->dtype)
    return tcr_fail(problem, TC_BAD_INPUT, "inputs", hint, "input '%s' must have dtype %s, got %s", spec->name,
                    tcr_dtype_name(spec->dtype), tcr_dtype_name(value->dtype));
  if (value->rank != spec->rank)
    return tcr_fail(problem, TC_BAD_INPUT, "inputs", hint, "input '%s' must have %d dimensions, got %d", spec->name,
                    spec->rank, value->rank);
  for (int32_t axis = 0; axis < spec->rank && status == TC_OK; axis++)
    status = check_size(contract, spec, axis, value->shape[axis], sizes, hint, problem);
  if (status != TC_OK) return status;
  if (!tcr_bytes_of(value->dtype, value->rank, value->shape, &bytes))
    return tcr_fail(problem, TC_BAD_INPUT, "inputs", hint, "input '%s' is larger than the memory of this machine",
                    spec->name);
  if (data && (value->bytes != bytes || (value->data == NULL && bytes != 0)))
    return tcr_fail(problem, TC_BAD_INPUT, "inputs", hint, "input '%s' must have %zu bytes for its shape, got %zu",
                    spec->name, bytes, value->data == NULL ? 0 : value->bytes);
  return data && bytes != 0 ? check_range(spec, value, hint, problem) : TC_OK;
}

static int32_t take_inputs(tc_bundle *bundle, const tc_value *inputs, uint32_t count, bool data, tcr_problem *problem) {
  static const char empty[1] = "";
  const tcr_contract *contract = bundle->contract;
  char hint[400];
  uint32_t index;
  for (uint32_t i = 0; i < contract->num_dims; i++) bundle->dims[i] = -1;
  for (uint32_t i = 0; i < contract->num_inputs; i++) bundle->given[i] = NULL;
  signature(contract, false, hint, sizeof hint);
  for (uint32_t i = 0; i < count; i++) {
    int32_t status = find(contract, &inputs[i], i, false, &index, problem);
    if (status != TC_OK) return status;
    if (bundle->given[index] != NULL)
      return tcr_fail(problem, TC_BAD_INPUT, "inputs", hint, "input '%s' is given twice", contract->inputs[index].name);
    status = check_value(contract, &contract->inputs[index], &inputs[i], bundle->dims, data, problem);
    if (status != TC_OK) return status;
    bundle->given[index] = inputs[i].data != NULL ? inputs[i].data : empty;
  }
  for (uint32_t i = 0; i < contract->num_inputs; i++)
    if (bundle->given[i] == NULL)
      return tcr_fail(problem, TC_BAD_INPUT, "inputs", hint, "input '%s' is missing", contract->inputs[i].name);
  return TC_OK;
}

static bool is_unknown(const tc_value *value) {
  for (int32_t axis = 0; axis < value->rank; axis++)
    if (value->shape[axis] == TC_UNKNOWN_SIZE) return true;
  return false;
}

/* Fills in one output's description; needed is 0 where only a run tells its size. */
static int32_t describe(tc_bundle *bundle, uint32_t index, tc_value *value, size_t *needed, tcr_problem *problem) {
  const tcr_tensor *spec = &bundle->contract->outputs[index];
  memset(value->shape, 0, sizeof value->shape);
  int32_t status = tcr_shape_of(bundle, bundle->dims, index, value->shape, problem);
  if (status != TC_OK) return status;
  value->dtype = spec->dtype;
  value->rank = spec->rank;
  *needed = 0;
  if (is_unknown(value)) return TC_OK;
  if (tcr_bytes_of(spec->dtype, spec->rank, value->shape, needed)) return TC_OK;
  return tcr_fail(problem, TC_NO_MEMORY, "outputs", "", "output '%s' is larger than the memory of this machine",
                  spec->name);
}

static int32_t too_small(tcr_problem *problem, const char *name, size_t needed, size_t given) {
  return tcr_fail(problem, TC_TOO_SMALL, "outputs", "bytes now tells how many each output needs",
                  "output '%s' needs %zu bytes, got %zu", name, needed, given);
}

static int32_t take_outputs(tc_bundle *bundle, tc_value *outputs, uint32_t count, bool execute, tcr_problem *problem) {
  static char empty[1];
  const tcr_contract *contract = bundle->contract;
  int32_t result = TC_OK;
  char hint[400];
  signature(contract, true, hint, sizeof hint);
  for (uint32_t i = 0; i < contract->num_outputs; i++) bundle->taken[i] = NULL;
  for (uint32_t i = 0; i < count; i++) {
    uint32_t index;
    size_t needed = 0, given = outputs[i].data == NULL ? 0 : outputs[i].bytes;
    int32_t status = find(contract, &outputs[i], i, true, &index, problem);
    if (status != TC_OK) return status;
    if (bundle->taken[index] != NULL)
      return tcr_fail(problem, TC_BAD_INPUT, "outputs", hint, "output '%s' is given twice",
                      contract->outputs[index].name);
    status = describe(bundle, index, &outputs[i], &needed, problem);
    if (status != TC_OK) return status;
    outputs[i].bytes = execute && is_unknown(&outputs[i]) ? given : needed; /* what there is, or what it takes */
    bundle->taken[index] = outputs[i].data != NULL && needed ? outputs[i].data : empty;
    if (execute && given < needed) result = too_small(problem, contract->outputs[index].name, needed, given);
  }
  for (uint32_t i = 0; execute && i < contract->num_outputs; i++)
    if (bundle->taken[i] == NULL)
      return tcr_fail(problem, TC_BAD_INPUT, "outputs", hint, "output '%s' is missing", contract->outputs[i].name);
  return result;
}

/* Outputs whose size the run told. */
static int32_t take_unknown(tc_bundle *bundle, tc_value *outputs, uint32_t count, tcr_problem *problem) {
  int32_t result = TC_OK;
  for (uint32_t i = 0; i < count; i++) {
    uint32_t index;
    const size_t room = outputs[i].bytes;
    if (!is_unknown(&outputs[i])) continue;
    int32_t status = find(bundle->contract, &outputs[i], i, true, &index, problem);
    if (status == TC_OK)
      status = tcr_take(bundle, index, outputs[i].shape, outputs[i].data, room, &outputs[i].bytes, problem);
    if (status != TC_OK) return status;
    if (room < outputs[i].bytes)
      result = too_small(problem, bundle->contract->outputs[index].name, outputs[i].bytes, room);
  }
  return result;
}

int32_t tcr_run_values(tc_bundle *bundle, const tc_value *inputs, uint32_t num_inputs, tc_value *outputs,
                       uint32_t num_outputs, bool execute, tcr_problem *problem) {
  if ((inputs == NULL && num_inputs) || (outputs == NULL && num_outputs))
    return tcr_fail(problem, TC_USAGE, "arguments", "", "a list of values is NULL, but its length is not 0");
  int32_t status = take_inputs(bundle, inputs, num_inputs, execute, problem);
  if (status == TC_OK) status = take_outputs(bundle, outputs, num_outputs, execute, problem);
  if (status != TC_OK || !execute) return status;
  status = tcr_execute(bundle, bundle->dims, bundle->given, bundle->taken, problem);
  return status == TC_OK ? take_unknown(bundle, outputs, num_outputs, problem) : status;
}
