/* Runs inputs of any allowed size: chooses an engine, fills up, splits, cuts. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static uint32_t dim_at(int64_t size) { return (uint32_t)(-(size + 1)); }

static bool is_dim(int64_t size) { return size < 0 && size != TC_UNKNOWN_SIZE; }

static void shape_at(const tcr_tensor *spec, const int64_t *sizes, int64_t *shape) {
  for (int32_t axis = 0; axis < spec->rank; axis++)
    shape[axis] = is_dim(spec->shape[axis]) ? sizes[dim_at(spec->shape[axis])] : spec->shape[axis];
}

int32_t tcr_engine_open(tc_bundle *bundle, uint32_t index, tcr_problem *problem) {
  tcr_engine *engine = &bundle->engines[index];
  const char *name = bundle->variants[index].file;
  const tcr_file *file = bundle->in_layout ? tcr_find_file(&bundle->layout, name) : NULL;
  char path[TCR_PATH] = "";
  if (engine->ops != NULL) return TC_OK;
#ifdef TC_STATIC_MODEL
  engine->ops = &tcr_aot;
#else
  engine->ops = strcmp(bundle->form, "vm") == 0 ? &tcr_vm : &tcr_aot;
#endif
  engine->layout = &bundle->layout;
  engine->contract = bundle->contract;
  engine->fixed = bundle->variants[index].sizes;
  engine->threads = bundle->threads;
  size_t tensors = (size_t)bundle->contract->num_inputs + bundle->contract->num_outputs;
  engine->effective = calloc((size_t)bundle->contract->num_dims + 1, sizeof *engine->effective);
  engine->staged = calloc(tensors, sizeof *engine->staged);
  engine->passed = calloc(tensors, sizeof *engine->passed);
  int32_t status = engine->effective && engine->staged && engine->passed
                       ? TC_OK
                       : tcr_no_memory(problem, tensors * sizeof *engine->staged, "the engine's inputs and outputs");
  if (status == TC_OK && file != NULL) status = tcr_blob_path(&bundle->layout, file->digest, path, problem);
  if (status == TC_OK) status = engine->ops->open(engine, path, name, problem);
  if (status != TC_OK) tcr_engine_close(bundle, index);
  return status;
}

void tcr_engine_close(tc_bundle *bundle, uint32_t index) {
  tcr_engine *engine = &bundle->engines[index];
  const tc_model *linked = engine->library == NULL ? engine->model : NULL;
  if (engine->ops == NULL) return;
  engine->ops->close(engine);
  for (uint32_t i = 0; engine->staged != NULL && i < bundle->contract->num_inputs + bundle->contract->num_outputs; i++)
    free(engine->staged[i]);
  free(engine->staged);
  free(engine->passed);
  free(engine->effective);
  memset(engine, 0, sizeof *engine);
  engine->model = linked;
}

/* Sets the sizes that the engine runs at; whether inputs must be filled up for it. */
static bool set_effective(tc_bundle *bundle, tcr_engine *engine, const int64_t *sizes) {
  bool filled = false;
  for (uint32_t dim = 0; dim < bundle->contract->num_dims; dim++) {
    engine->effective[dim] = engine->fixed[dim] != 0 ? engine->fixed[dim] : sizes[dim];
    filled |= sizes[dim] >= 0 && engine->effective[dim] != sizes[dim];
  }
  return filled;
}

/* The shape that an engine gives an output, and what of it is kept. */
static int32_t output_shapes(tc_bundle *bundle, tcr_engine *engine, const int64_t *sizes, uint32_t output,
                             int64_t *whole, int64_t *kept, tcr_problem *problem) {
  const tcr_tensor *spec = &bundle->contract->outputs[output];
  engine->ops->output_shape(engine, output, engine->effective, whole);
  for (int32_t axis = 0; axis < spec->rank; axis++) {
    int64_t want = spec->shape[axis];
    uint32_t dim = is_dim(want) ? dim_at(want) : 0;
    if (is_dim(want)) want = sizes[dim] >= 0 ? engine->effective[dim] : TC_UNKNOWN_SIZE;
    kept[axis] = whole[axis];
    if (whole[axis] == TC_UNKNOWN_SIZE && want == TC_UNKNOWN_SIZE && engine->ops->take != NULL) continue;
    if (whole[axis] < 0 || (want >= 0 && whole[axis] != want))
      return tcr_damaged(problem, "engine", "gives output '%s' axis %d the size %lld, its contract says %lld",
                         spec->name, axis, (long long)whole[axis], (long long)want);
    if (is_dim(spec->shape[axis]) && want >= 0) kept[axis] = sizes[dim];
  }
  return TC_OK;
}

int32_t tcr_shape_of(tc_bundle *bundle, int64_t *sizes, uint32_t output, int64_t *shape, tcr_problem *problem) {
  int64_t whole[TC_MAX_RANK];
  const tcr_tensor *spec = &bundle->contract->outputs[output];
  uint32_t variant, split;
  int32_t status =
      tcr_choose(bundle->contract, bundle->variants, bundle->num_variants, sizes, &variant, &split, problem);
  if (status != TC_OK) return status;
  if (split != TCR_NO_SPLIT) { /* as one part, but for the size along which it is split */
    int64_t total = sizes[split];
    sizes[split] = bundle->variants[variant].sizes[split];
    status = tcr_shape_of(bundle, sizes, output, shape, problem);
    sizes[split] = total;
    for (int32_t axis = 0; axis < spec->rank; axis++)
      if (spec->shape[axis] == -(int64_t)split - 1) shape[axis] = total;
    return status;
  }
  status = tcr_engine_open(bundle, variant, problem);
  if (status != TC_OK) return status;
  set_effective(bundle, &bundle->engines[variant], sizes);
  return output_shapes(bundle, &bundle->engines[variant], sizes, output, whole, shape, problem);
}

/* Memory for a filled-up array, kept for later runs: its size is that of the engine, but for dynamic dimensions. */
static int32_t stage(tcr_engine *engine, size_t index, int32_t dtype, int32_t rank, const int64_t *shape, bool fixed,
                     tcr_problem *problem) {
  size_t bytes;
  if (engine->staged[index] != NULL && fixed) return TC_OK;
  free(engine->staged[index]);
  engine->staged[index] = NULL;
  if (!tcr_bytes_of(dtype, rank, shape, &bytes) || bytes > SIZE_MAX - 2 * TC_ALIGNMENT)
    return tcr_no_memory(problem, UINT64_MAX, "a filled-up array");
  /* aligned_alloc takes multiples of the alignment only. */
  engine->staged[index] = aligned_alloc(TC_ALIGNMENT, (bytes / TC_ALIGNMENT + 1) * TC_ALIGNMENT);
  return engine->staged[index] != NULL ? TC_OK : tcr_no_memory(problem, bytes, "a filled-up array");
}

static bool all_fixed(const tcr_engine *engine, const tcr_tensor *spec) {
  for (int32_t axis = 0; axis < spec->rank; axis++)
    if (spec->shape[axis] == TC_UNKNOWN_SIZE ||
        (is_dim(spec->shape[axis]) && engine->fixed[dim_at(spec->shape[axis])] == 0))
      return false;
  return true;
}

static bool same(int32_t rank, const int64_t *one, const int64_t *other) {
  return rank == 0 || memcmp(one, other, (size_t)rank * sizeof *one) == 0;
}

static int32_t run_filled(tc_bundle *bundle, tcr_engine *engine, const int64_t *sizes, const void *const *inputs,
                          void *const *outputs, tcr_problem *problem) {
  static const int64_t start[TC_MAX_RANK] = {0};
  const tcr_contract *contract = bundle->contract;
  const uint32_t count = contract->num_inputs;
  int64_t from[TC_MAX_RANK], to[TC_MAX_RANK];
  int32_t status = TC_OK;
  for (uint32_t i = 0; i < count && status == TC_OK; i++) {
    const tcr_tensor *spec = &contract->inputs[i];
    shape_at(spec, sizes, from);
    shape_at(spec, engine->effective, to);
    memcpy(&engine->passed[i], &inputs[i], sizeof *inputs);
    if (same(spec->rank, from, to)) continue;
    status = stage(engine, i, spec->dtype, spec->rank, to, all_fixed(engine, spec), problem);
    if (status == TC_OK) tcr_fill(contract, spec, from, inputs[i], to, engine->staged[i]);
    engine->passed[i] = engine->staged[i];
  }
  for (uint32_t i = 0; i < contract->num_outputs && status == TC_OK; i++) {
    const tcr_tensor *spec = &contract->outputs[i];
    status = output_shapes(bundle, engine, sizes, i, from, to, problem);
    engine->passed[count + i] = outputs[i];
    if (status != TC_OK || same(spec->rank, from, to)) continue;
    status = stage(engine, count + i, spec->dtype, spec->rank, from, all_fixed(engine, spec), problem);
    engine->passed[count + i] = engine->staged[count + i];
  }
  if (status == TC_OK)
    status = engine->ops->run(engine, engine->effective, (const void *const *)engine->passed, engine->passed + count,
                              problem);
  for (uint32_t i = 0; i < contract->num_outputs && status == TC_OK; i++) {
    const tcr_tensor *spec = &contract->outputs[i];
    if (engine->passed[count + i] == outputs[i]) continue;
    status = output_shapes(bundle, engine, sizes, i, from, to, problem);
    tcr_copy_block(tc_item_size(spec->dtype), spec->rank, to, engine->passed[count + i], from, start, outputs[i], to,
                   start);
  }
  return status;
}

/* Where part of an array begins if the part is dense in it already; -1 if it is not. */
static int64_t dense_axis(const tcr_tensor *spec, const int64_t *shape, uint32_t dim) {
  int64_t found = -1;
  for (int32_t axis = spec->rank - 1; axis >= 0; axis--) {
    if (spec->shape[axis] == -(int64_t)dim - 1) {
      if (found >= 0) return -1;
      found = axis;
    } else if (found >= 0 && shape[axis] != 1) {
      return -1;
    }
  }
  return found;
}

typedef struct part {
  uint32_t dim;
  int64_t start, size, total;
} part;

/* Copies a part of an array from or into the whole. */
static void copy_part(const tcr_tensor *spec, const int64_t *whole, const part *piece, char *array, char *dense,
                      bool out) {
  static const int64_t zero[TC_MAX_RANK] = {0};
  int64_t extent[TC_MAX_RANK], start[TC_MAX_RANK];
  for (int32_t axis = 0; axis < spec->rank; axis++) {
    bool along = spec->shape[axis] == -(int64_t)piece->dim - 1;
    extent[axis] = along ? piece->size : whole[axis];
    start[axis] = along ? piece->start : 0;
  }
  size_t item = tc_item_size(spec->dtype);
  if (out)
    tcr_copy_block(item, spec->rank, extent, dense, extent, zero, array, whole, start);
  else
    tcr_copy_block(item, spec->rank, extent, array, whole, start, dense, extent, zero);
}

/* Points at the part of an array, or at memory for a copy of it; array NULL-safe for arrays without the dimension. */
static int32_t part_of(const tcr_tensor *spec, const int64_t *whole, const part *piece, char *array, void **copy,
                       void **pointer, tcr_problem *problem) {
  bool along = false;
  size_t bytes = 0;
  for (int32_t axis = 0; axis < spec->rank; axis++) along |= spec->shape[axis] == -(int64_t)piece->dim - 1;
  tcr_bytes_of(spec->dtype, spec->rank, whole, &bytes); /* it is memory of the caller, so this is a size */
  *pointer = array;
  if (!along) return TC_OK;
  if (dense_axis(spec, whole, piece->dim) >= 0) {
    *pointer = array + bytes / (size_t)piece->total * (size_t)piece->start;
    return TC_OK;
  }
  if (*copy == NULL) *copy = malloc(bytes + 1);
  *pointer = *copy;
  return *copy != NULL ? TC_OK : tcr_no_memory(problem, bytes, "a part of the batch");
}

static int32_t run_part(tc_bundle *bundle, int64_t *sizes, const part *piece, const void *const *inputs,
                        void *const *outputs, void **copies, void **pointers, tcr_problem *problem) {
  const tcr_contract *contract = bundle->contract;
  const uint32_t count = contract->num_inputs;
  int64_t whole[TC_MAX_RANK];
  int32_t status = TC_OK;
  for (uint32_t i = 0; i < count + contract->num_outputs && status == TC_OK; i++) {
    const tcr_tensor *spec = i < count ? &contract->inputs[i] : &contract->outputs[i - count];
    char *array;
    memcpy(&array, i < count ? (const void *)&inputs[i] : (const void *)&outputs[i - count], sizeof array);
    sizes[piece->dim] = piece->total;
    if (i < count)
      shape_at(spec, sizes, whole);
    else
      status = tcr_shape_of(bundle, sizes, i - count, whole, problem);
    sizes[piece->dim] = piece->size;
    if (status == TC_OK) status = part_of(spec, whole, piece, array, &copies[i], &pointers[i], problem);
    if (status == TC_OK && i < count && copies[i] != NULL) copy_part(spec, whole, piece, array, copies[i], false);
  }
  if (status == TC_OK) status = tcr_execute(bundle, sizes, (const void *const *)pointers, pointers + count, problem);
  for (uint32_t i = 0; i < contract->num_outputs && status == TC_OK; i++) {
    if (copies[count + i] == NULL) continue;
    sizes[piece->dim] = piece->total;
    status = tcr_shape_of(bundle, sizes, i, whole, problem);
    sizes[piece->dim] = piece->size;
    copy_part(&contract->outputs[i], whole, piece, outputs[i], copies[count + i], true);
  }
  return status;
}

static int32_t run_in_parts(tc_bundle *bundle, int64_t *sizes, uint32_t split, int64_t step, const void *const *inputs,
                            void *const *outputs, tcr_problem *problem) {
  size_t count = (size_t)bundle->contract->num_inputs + bundle->contract->num_outputs;
  part piece = {split, 0, 0, sizes[split]};
  void **copies = calloc(2 * count, sizeof *copies);
  int32_t status = copies == NULL ? tcr_no_memory(problem, 2 * count * sizeof *copies, "parts of the batch") : TC_OK;
  for (; status == TC_OK && piece.start < piece.total; piece.start += piece.size) {
    piece.size = piece.total - piece.start < step ? piece.total - piece.start : step;
    sizes[split] = piece.size;
    status = run_part(bundle, sizes, &piece, inputs, outputs, copies, copies + count, problem);
  }
  sizes[split] = piece.total;
  for (size_t i = 0; copies != NULL && i < count; i++) free(copies[i]);
  free(copies);
  return status;
}

/* Whether all sizes of outputs are known before a run; a plan computes those that the contract does not tell. */
static bool all_known(const tc_bundle *bundle, const int64_t *sizes) {
  if (strcmp(bundle->form, "vm") != 0) return true;
  for (uint32_t i = 0; i < bundle->contract->num_outputs; i++) {
    const tcr_tensor *spec = &bundle->contract->outputs[i];
    for (int32_t axis = 0; axis < spec->rank; axis++)
      if (spec->shape[axis] == TC_UNKNOWN_SIZE || (is_dim(spec->shape[axis]) && sizes[dim_at(spec->shape[axis])] < 0))
        return false;
  }
  return true;
}

static int32_t cannot_cut(tcr_problem *problem) {
  return tcr_fail(problem, TC_NO_ENGINE, "engine", "give inputs of the sizes that an engine was compiled for",
                  "outputs whose size only a run tells can't be cut, and these inputs would be filled up or split");
}

int32_t tcr_take(const tc_bundle *bundle, uint32_t output, int64_t *shape, void *to, size_t room, size_t *bytes,
                 tcr_problem *problem) {
  return bundle->ran->ops->take(bundle->ran, output, shape, to, room, bytes, problem);
}

int32_t tcr_execute(tc_bundle *bundle, int64_t *sizes, const void *const *inputs, void *const *outputs,
                    tcr_problem *problem) {
  uint32_t variant, split;
  int32_t status =
      tcr_choose(bundle->contract, bundle->variants, bundle->num_variants, sizes, &variant, &split, problem);
  if (status != TC_OK) return status;
  if (split != TCR_NO_SPLIT && !all_known(bundle, sizes)) return cannot_cut(problem);
  if (split != TCR_NO_SPLIT)
    return run_in_parts(bundle, sizes, split, bundle->variants[variant].sizes[split], inputs, outputs, problem);
  status = tcr_engine_open(bundle, variant, problem);
  if (status != TC_OK) return status;
  tcr_engine *engine = &bundle->engines[variant];
  bundle->ran = engine;
  const bool filled = set_effective(bundle, engine, sizes);
  if (filled && !all_known(bundle, sizes)) return cannot_cut(problem);
  if (filled) return run_filled(bundle, engine, sizes, inputs, outputs, problem);
  return engine->ops->run(engine, engine->effective, inputs, outputs, problem);
}
