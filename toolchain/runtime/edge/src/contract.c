/* The contract of a model: its inputs, outputs and dynamic dimensions. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static const char dtypes[][8] = {"bool",   "int8",   "int16",  "int32",   "int64",   "uint8",
                                 "uint16", "uint32", "uint64", "float16", "float32", "float64"};
#define DTYPES ((int32_t)(sizeof dtypes / sizeof *dtypes))

const char *tcr_dtype_name(int32_t dtype) { return dtype >= 1 && dtype <= DTYPES ? dtypes[dtype - 1] : "?"; }

int32_t tcr_dtype_of(const char *name) {
  for (int32_t i = 0; name != NULL && i < DTYPES; i++)
    if (strcmp(dtypes[i], name) == 0) return i + 1;
  return 0;
}

bool tcr_bytes_of(int32_t dtype, int32_t rank, const int64_t *shape, size_t *bytes) {
  uint64_t total = tc_item_size(dtype);
  bool empty = false;
  if (total == 0) return false;
  for (int32_t i = 0; i < rank; i++) {
    if (shape[i] < 0) return false;
    if (shape[i] == 0)
      empty = true;
    else if ((uint64_t)shape[i] > TCR_MAX_ELEMENTS / total)
      return false;
    else
      total *= (uint64_t)shape[i];
  }
  *bytes = empty ? 0 : (size_t)total;
  return true;
}

void tcr_shape_text(tcr_text *text, int32_t rank, const int64_t *shape, const tcr_contract *contract) {
  tcr_append(text, "[");
  for (int32_t i = 0; i < rank; i++) {
    if (i) tcr_append(text, ", ");
    if (shape[i] >= 0 || contract == NULL)
      tcr_append(text, "%lld", (long long)shape[i]);
    else if (shape[i] == TC_UNKNOWN_SIZE)
      tcr_append(text, "?");
    else
      tcr_append(text, "%s", contract->dims[-(shape[i] + 1)].name);
  }
  tcr_append(text, "]");
}

static int32_t bad(tcr_problem *problem, const char *where, const char *what, const char *name) {
  return tcr_damaged(problem, where, "is not a contract: %s%s", what, name);
}

static int32_t parse_dim(tcr_dim *dim, const json_value *entry, const char *where, tcr_problem *problem) {
  const json_value *min = json_get(entry, "min"), *max = json_get(entry, "max"), *batch = json_get(entry, "batch");
  dim->name = entry->key;
  if (!json_is(entry, JSON_OBJECT)) return bad(problem, where, "must be an object: dim ", entry->key);
  dim->min = min == NULL ? 1 : min->whole;
  dim->max = max == NULL || max->kind == JSON_NULL ? INT64_MAX : max->whole;
  dim->batch = json_is(batch, JSON_BOOL) && batch->truth;
  if ((min != NULL && !min->integer) || (max != NULL && max->kind != JSON_NULL && !max->integer))
    return bad(problem, where, "min and max must be whole numbers: dim ", entry->key);
  return TC_OK;
}

static int64_t size_of_json(const json_value *value, const tcr_contract *contract, bool output, bool *known) {
  *known = true;
  if (json_is(value, JSON_NUMBER) && value->integer && value->whole >= 0) return value->whole;
  const char *name = json_text(value);
  for (uint32_t i = 0; name != NULL && i < contract->num_dims; i++)
    if (strcmp(contract->dims[i].name, name) == 0) return -(int64_t)i - 1;
  *known = output && (name != NULL || json_is(value, JSON_NULL));
  return TC_UNKNOWN_SIZE;
}

static int32_t parse_pad(tcr_tensor *spec, const json_value *pad, const char *where, tcr_problem *problem) {
  if (pad == NULL || pad->kind == JSON_NULL) return TC_OK;
  if (!json_is(pad, JSON_NUMBER)) return bad(problem, where, "pad must be a number or null: input ", spec->name);
  spec->has_pad = true;
  spec->pad = pad->as.number;
  if (spec->dtype >= TC_FLOAT16) return TC_OK;
  /* 2^63: what a double must be below to be an int64. */
  if (!pad->integer && !(fabs(pad->as.number) < 9223372036854775808.0 && pad->as.number == (double)(int64_t)pad->as.number))
    return bad(problem, where, "pad is not of the dtype: input ", spec->name);
  spec->pad_integer = pad->integer ? pad->whole : (int64_t)pad->as.number;
  if (spec->pad_integer < 0 && spec->dtype >= TC_UINT8)
    return bad(problem, where, "pad is not of the dtype: input ", spec->name);
  return TC_OK;
}

/* Binds whole numbers; floats only draw random values from theirs. */
static int32_t parse_range(tcr_tensor *spec, const json_value *entry, const char *where, tcr_problem *problem) {
  const json_value *low = json_get(entry, "low"), *high = json_get(entry, "high");
  spec->low = INT64_MIN;
  spec->high = INT64_MAX;
  if (spec->dtype == TC_BOOL || spec->dtype >= TC_FLOAT16) return TC_OK;
  for (int i = 0; i < 2; i++) {
    const json_value *bound = i ? high : low;
    if (bound == NULL || bound->kind == JSON_NULL) continue;
    if (!json_is(bound, JSON_NUMBER)) return bad(problem, where, "low and high must be numbers: input ", spec->name);
    if (bound->integer) *(i ? &spec->high : &spec->low) = bound->whole;
  }
  return TC_OK;
}

static int32_t parse_tensor(tcr_tensor *spec, const json_value *entry, const tcr_contract *contract, bool output,
                            const char *where, tcr_problem *problem) {
  const json_value *shape = json_get(entry, "shape");
  const char *dtype = json_text(json_get(entry, "dtype"));
  spec->name = json_text(json_get(entry, "name"));
  spec->dtype = tcr_dtype_of(dtype);
  if (spec->name == NULL || spec->name[0] == 0) return bad(problem, where, "an input or output has no name", "");
  if (spec->dtype == 0) return bad(problem, where, "an unknown dtype: ", dtype == NULL ? spec->name : dtype);
  if (!json_is(shape, JSON_LIST)) return bad(problem, where, "a shape must be a list: ", spec->name);
  if (shape->count > TC_MAX_RANK)
    return tcr_fail(problem, TC_NO_ENGINE, where, "", "%s has %u dimensions, this runtime takes up to %d", spec->name,
                    shape->count, TC_MAX_RANK);
  for (const json_value *size = shape->as.first; size; size = size->next) {
    bool known;
    spec->shape[spec->rank++] = size_of_json(size, contract, output, &known);
    if (!known) return bad(problem, where, "a size must be a whole number or the name of a dim: ", spec->name);
  }
  int32_t status = parse_pad(spec, output ? NULL : json_get(entry, "pad"), where, problem);
  return status != TC_OK || output ? status : parse_range(spec, entry, where, problem);
}

static int32_t parse_tensors(tcr_tensor *specs, const json_value *list, const tcr_contract *contract, bool output,
                             const char *where, tcr_problem *problem) {
  uint32_t count = 0;
  for (const json_value *entry = list->as.first; entry; entry = entry->next, count++) {
    int32_t status = parse_tensor(&specs[count], entry, contract, output, where, problem);
    if (status != TC_OK) return status;
    for (uint32_t i = 0; i < count; i++)
      if (strcmp(specs[i].name, specs[count].name) == 0)
        return bad(problem, where, "a name is given twice: ", specs[i].name);
  }
  return TC_OK;
}

static bool make(tcr_contract *contract, uint32_t inputs, uint32_t outputs, uint32_t dims) {
  memset(contract, 0, sizeof *contract);
  contract->num_inputs = inputs;
  contract->num_outputs = outputs;
  contract->num_dims = dims;
  contract->inputs = calloc((size_t)inputs + 1, sizeof *contract->inputs);
  contract->outputs = calloc((size_t)outputs + 1, sizeof *contract->outputs);
  contract->dims = calloc((size_t)dims + 1, sizeof *contract->dims);
  return contract->inputs != NULL && contract->outputs != NULL && contract->dims != NULL;
}

/* Bound on inputs, outputs and dims: what compares each with each stays quick on a hostile bundle. */
#define MANY 1024

int32_t tcr_parse_contract(tcr_contract *contract, const json_value *data, const char *where, tcr_problem *problem) {
  const json_value *inputs = json_get(data, "inputs"), *outputs = json_get(data, "outputs"),
                   *dims = json_get(data, "dims");
  int32_t status = tcr_check_schema(data, where, problem);
  if (status != TC_OK) return status;
  if (!json_is(inputs, JSON_LIST) || !json_is(outputs, JSON_LIST) || (dims != NULL && !json_is(dims, JSON_OBJECT)) ||
      inputs->count == 0 || outputs->count == 0)
    return bad(problem, where, "there must be inputs and outputs", "");
  if (inputs->count > MANY || outputs->count > MANY || (dims != NULL && dims->count > MANY))
    return bad(problem, where, "more than 1024 inputs, outputs or dims", "");
  if (!make(contract, inputs->count, outputs->count, dims == NULL ? 0 : dims->count))
    return tcr_no_memory(problem, inputs->count + outputs->count, "the contract");
  uint32_t index = 0;
  for (const json_value *entry = dims == NULL ? NULL : dims->as.first; entry; entry = entry->next) {
    status = parse_dim(&contract->dims[index++], entry, where, problem);
    if (status != TC_OK) return status;
  }
  status = parse_tensors(contract->inputs, inputs, contract, false, where, problem);
  if (status != TC_OK) return status;
  return parse_tensors(contract->outputs, outputs, contract, true, where, problem);
}

static int32_t tensor_of_model(tcr_tensor *to, const tc_tensor *from, uint32_t dims, bool output,
                               tcr_problem *problem) {
  to->name = from->name;
  to->dtype = from->dtype;
  to->rank = from->rank;
  if (from->rank < 0 || from->rank > TC_MAX_RANK || tc_item_size(from->dtype) == 0)
    return tcr_damaged(problem, "engine", "%s has %d dimensions of dtype %d", from->name, from->rank, from->dtype);
  for (int32_t i = 0; i < from->rank; i++) {
    to->shape[i] = from->shape[i];
    if (from->shape[i] < -(int64_t)dims && !(output && from->shape[i] == TC_COMPUTED))
      return tcr_damaged(problem, "engine", "%s has an unknown dim", from->name);
  }
  return TC_OK;
}

int32_t tcr_contract_of_model(tcr_contract *contract, const tc_model *model, tcr_problem *problem) {
  int32_t status = TC_OK;
  if (!make(contract, model->num_inputs, model->num_outputs, model->num_dims))
    return tcr_no_memory(problem, model->num_inputs, "the contract");
  for (uint32_t i = 0; i < model->num_dims; i++)
    contract->dims[i] = (tcr_dim){model->dims[i].name, model->dims[i].min, model->dims[i].max, false};
  for (uint32_t i = 0; i < model->num_inputs && status == TC_OK; i++)
    status = tensor_of_model(&contract->inputs[i], &model->inputs[i], model->num_dims, false, problem);
  for (uint32_t i = 0; i < model->num_outputs && status == TC_OK; i++)
    status = tensor_of_model(&contract->outputs[i], &model->outputs[i], model->num_dims, true, problem);
  return status;
}

void tcr_free_contract(tcr_contract *contract) {
  free(contract->inputs);
  free(contract->outputs);
  free(contract->dims);
  memset(contract, 0, sizeof *contract);
}
