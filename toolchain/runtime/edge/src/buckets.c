/* Inputs of any allowed size on engines that were compiled for fixed sizes: toolchain/runtime/buckets.py in C. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static bool bears(const tcr_tensor *spec, uint32_t dim) {
  for (int32_t axis = 0; axis < spec->rank; axis++)
    if (spec->shape[axis] == -(int64_t)dim - 1) return true;
  return false;
}

/* NULL where a dimension can be filled up to a bucket, else the name of the tensor that forbids it. */
static const char *cannot_fill(const tcr_contract *contract, uint32_t dim) {
  if (contract->dims[dim].batch) {
    for (uint32_t i = 0; i < contract->num_outputs; i++)
      if (!bears(&contract->outputs[i], dim)) return contract->outputs[i].name;
    return NULL;
  }
  for (uint32_t i = 0; i < contract->num_inputs; i++)
    if (bears(&contract->inputs[i], dim) && !contract->inputs[i].has_pad) return contract->inputs[i].name;
  return NULL;
}

/* sizes[dim] is -1 where no input has the dimension, fixed[dim] is 0 where the engine takes any size. */
static bool fits(const tcr_contract *contract, const int64_t *fixed, const int64_t *sizes, bool splitting) {
  for (uint32_t dim = 0; dim < contract->num_dims; dim++) {
    int64_t size = fixed[dim], got = sizes[dim] < 0 ? size : sizes[dim];
    if (size == 0 || got == size) continue;
    if (got == 0 || cannot_fill(contract, dim) != NULL) return false;
    if (got > size && !(splitting && contract->dims[dim].batch)) return false;
  }
  return true;
}

static double work(const tcr_contract *contract, const int64_t *fixed, const int64_t *sizes) {
  double total = 1;
  for (uint32_t dim = 0; dim < contract->num_dims; dim++)
    if (sizes[dim] >= 0) total *= (double)(fixed[dim] != 0 ? fixed[dim] : sizes[dim]);
  return total;
}

/* Least work in the dimensions that are not split, then the largest parts. */
static void split_order(const tcr_contract *contract, const int64_t *fixed, const int64_t *sizes, double *kept,
                        double *parts) {
  *kept = *parts = 1;
  for (uint32_t dim = 0; dim < contract->num_dims; dim++) {
    if (fixed[dim] == 0) continue;
    if (sizes[dim] > fixed[dim])
      *parts *= (double)fixed[dim];
    else
      *kept *= (double)fixed[dim];
  }
}

static void sizes_text(tcr_text *text, const tcr_contract *contract, const int64_t *sizes, int64_t none) {
  size_t before = text->length;
  for (uint32_t dim = 0; dim < contract->num_dims; dim++)
    if (sizes[dim] != none)
      tcr_append(text, "%s%s=%lld", text->length > before ? ", " : "", contract->dims[dim].name, (long long)sizes[dim]);
  if (text->length == before) tcr_append(text, "any size");
}

static int32_t none_fits(const tcr_contract *contract, const tcr_variant *variants, uint32_t count,
                         const int64_t *sizes, tcr_problem *problem) {
  char got[200], have[400], why[300] = "";
  tcr_text got_text = {got, sizeof got, 0}, have_text = {have, sizeof have, 0}, why_text = {why, sizeof why, 0};
  sizes_text(&got_text, contract, sizes, -1);
  for (uint32_t i = 0; i < count; i++) {
    if (i) tcr_append(&have_text, "; ");
    sizes_text(&have_text, contract, variants[i].sizes, 0);
  }
  for (uint32_t dim = 0; dim < contract->num_dims; dim++) {
    const char *name = variants[0].sizes[dim] != 0 ? cannot_fill(contract, dim) : NULL;
    if (name != NULL)
      tcr_append(&why_text, "\n  %s: only these exact sizes, because '%s' has no %s", contract->dims[dim].name, name,
                 contract->dims[dim].batch ? "such axis to cut" : "pad value");
  }
  return tcr_fail(problem, TC_BAD_INPUT, "inputs", "",
                  "no engine of this bundle was compiled for %s%s\n  hint: it has engines for %s", got, why, have);
}

int32_t tcr_choose(const tcr_contract *contract, const tcr_variant *variants, uint32_t count, const int64_t *sizes,
                   uint32_t *variant, uint32_t *split, tcr_problem *problem) {
  double least = 0, kept = 0, parts = 0;
  *split = TCR_NO_SPLIT;
  *variant = count;
  for (uint32_t i = 0; i < count; i++) {
    if (!fits(contract, variants[i].sizes, sizes, false)) continue;
    double amount = work(contract, variants[i].sizes, sizes);
    if (*variant == count || amount < least) *variant = i, least = amount;
  }
  if (*variant < count) return TC_OK;
  for (uint32_t i = 0; i < count; i++) {
    double own_kept, own_parts;
    if (!fits(contract, variants[i].sizes, sizes, true)) continue;
    split_order(contract, variants[i].sizes, sizes, &own_kept, &own_parts);
    if (*variant == count || own_kept < kept || (own_kept == kept && own_parts > parts))
      *variant = i, kept = own_kept, parts = own_parts;
  }
  if (*variant == count) return none_fits(contract, variants, count, sizes, problem);
  for (uint32_t dim = 0; dim < contract->num_dims && *split == TCR_NO_SPLIT; dim++)
    if (variants[*variant].sizes[dim] != 0 && sizes[dim] > variants[*variant].sizes[dim]) *split = dim;
  return TC_OK;
}

void tcr_copy_block(size_t item, int32_t rank, const int64_t *extent, const char *from, const int64_t *from_shape,
                    const int64_t *from_start, char *to, const int64_t *to_shape, const int64_t *to_start) {
  int64_t at[TC_MAX_RANK] = {0};
  size_t row = rank > 0 ? (size_t)extent[rank - 1] * item : item;
  for (int32_t axis = 0; axis < rank; axis++)
    if (extent[axis] == 0) return;
  for (;;) {
    size_t source = 0, target = 0;
    for (int32_t axis = 0; axis < rank; axis++) {
      source = source * (size_t)from_shape[axis] + (size_t)(from_start[axis] + at[axis]);
      target = target * (size_t)to_shape[axis] + (size_t)(to_start[axis] + at[axis]);
    }
    memcpy(to + target * item, from + source * item, row);
    int32_t axis = rank - 2; /* the last axis was copied whole */
    while (axis >= 0 && ++at[axis] == extent[axis]) at[axis--] = 0;
    if (axis < 0) return;
  }
}

/* A float64 as the bits of a float16, rounded to nearest even. */
static uint16_t half(double value) {
  if (isnan(value)) return 0x7e00;
  uint16_t sign = signbit(value) ? 0x8000 : 0;
  double size = fabs(value);
  uint64_t all;
  if (size >= 65520) return sign | 0x7c00;
  memcpy(&all, &size, sizeof all);
  int power = (int)(all >> 52) - 1023; /* 2^power <= size < 2^(power + 1), but for numbers far too small */
  if (power < -14) power = -14;
  /* In units of the last place, rounded by the adder of double: 2^52 leaves no room for a fraction. */
  volatile double units = size * tcr_power_of_two(10 - power) + 4503599627370496.0;
  uint16_t bits = (uint16_t)(units - 4503599627370496.0);
  return (uint16_t)(sign | (bits + (power > -14 ? (power + 14) * 1024 : 0)));
}

static void pad_item(const tcr_tensor *spec, char item[8]) {
  const int64_t whole = spec->pad_integer;
  const float single = (float)spec->pad;
  const uint16_t narrow = half(spec->pad);
  const bool truth = whole != 0;
  const int8_t i8 = (int8_t)whole;
  const int16_t i16 = (int16_t)whole;
  const int32_t i32 = (int32_t)whole;
  switch (spec->dtype) {
    case TC_BOOL: memcpy(item, &truth, 1); break;
    case TC_FLOAT16: memcpy(item, &narrow, 2); break;
    case TC_FLOAT32: memcpy(item, &single, 4); break;
    case TC_FLOAT64: memcpy(item, &spec->pad, 8); break;
    default:
      switch (tc_item_size(spec->dtype)) {
        case 1: memcpy(item, &i8, 1); break;
        case 2: memcpy(item, &i16, 2); break;
        case 4: memcpy(item, &i32, 4); break;
        default: memcpy(item, &whole, 8);
      }
  }
}

void tcr_fill(const tcr_contract *contract, const tcr_tensor *spec, const int64_t *from_shape, const void *from,
              const int64_t *to_shape, void *to) {
  int64_t at[TC_MAX_RANK] = {0};
  size_t item = tc_item_size(spec->dtype), target = 0;
  char pad[8];
  for (int32_t axis = 0; axis < spec->rank; axis++)
    if (to_shape[axis] == 0) return;
  pad_item(spec, pad);
  for (;;) {
    size_t source = 0;
    bool inside = true;
    for (int32_t axis = 0; axis < spec->rank; axis++) {
      int64_t index = at[axis];
      if (index >= from_shape[axis]) { /* a row past the end repeats the last one, or is the pad value */
        bool batch = spec->shape[axis] < 0 && contract->dims[-(spec->shape[axis] + 1)].batch;
        if (!batch) inside = false;
        index = from_shape[axis] - 1;
      }
      source = source * (size_t)from_shape[axis] + (size_t)index;
    }
    /* A whole row of the last axis at once where it is not filled itself. */
    bool whole = inside && spec->rank > 0 && at[spec->rank - 1] == 0;
    size_t run = whole ? (size_t)from_shape[spec->rank - 1] : 1;
    memcpy((char *)to + target * item, inside ? (const char *)from + source * item : pad, run * item);
    target += run;
    int32_t axis = spec->rank - 1;
    if (axis < 0) return;
    at[axis] += (int64_t)run;
    while (at[axis] == to_shape[axis]) {
      at[axis] = 0;
      if (--axis < 0) return;
      at[axis]++;
    }
  }
}
