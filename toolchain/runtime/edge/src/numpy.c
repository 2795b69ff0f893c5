/* Arrays in numpy's .npy form (numpy.lib.format), and .npz archives of them: ZIP without compression. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static const struct {
  char descr[4];
  uint8_t dtype;
} descrs[] = {
    {"|b1", TC_BOOL},   {"|i1", TC_INT8},    {"<i2", TC_INT16},   {"<i4", TC_INT32},
    {"<i8", TC_INT64},  {"|u1", TC_UINT8},   {"<u2", TC_UINT16},  {"<u4", TC_UINT32},
    {"<u8", TC_UINT64}, {"<f2", TC_FLOAT16}, {"<f4", TC_FLOAT32}, {"<f8", TC_FLOAT64},
};
#define DESCRS (sizeof descrs / sizeof *descrs)

static int32_t bad_npy(tcr_problem *problem, const char *where, const char *what) {
  return tcr_fail(problem, TC_BAD_INPUT, where, "write it with numpy.save, little-endian and in C order",
                  "is not an array that this runtime reads: %s", what);
}

/* The text after a key of the header, which is a Python dictionary as numpy writes it. */
static const char *after(const char *header, const char *key) {
  const char *at = strstr(header, key);
  if (at == NULL) return "";
  at += strlen(key);
  return at + strspn(at, " :");
}

static bool parse_shape(const char *at, tcr_array *array) {
  if (*at++ != '(') return false;
  for (;;) {
    at += strspn(at, " ,");
    if (*at == ')') return true;
    int64_t size = 0;
    const char *start = at;
    for (; *at >= '0' && *at <= '9'; at++) {
      if (size > (INT64_MAX - 9) / 10) return false;
      size = size * 10 + (*at - '0');
    }
    if (at == start || array->rank == TC_MAX_RANK) return false;
    array->shape[array->rank++] = size;
  }
}

int32_t tcr_parse_npy(const unsigned char *data, size_t bytes, const char *where, tcr_array *array,
                      tcr_problem *problem) {
  char header[1024];
  memset(array, 0, sizeof *array);
  if (bytes < 12 || memcmp(data, "\x93NUMPY", 6) != 0) return bad_npy(problem, where, "it does not begin as one");
  size_t start = data[6] == 1 ? 10 : 12;
  size_t length = data[8] | (size_t)data[9] << 8 | (start == 12 ? (size_t)data[10] << 16 | (size_t)data[11] << 24 : 0);
  if (data[6] < 1 || data[6] > 3) return bad_npy(problem, where, "an unknown version");
  if (length > bytes - start || length >= sizeof header) return bad_npy(problem, where, "its header is too long");
  memcpy(header, data + start, length);
  header[length] = 0;
  const char *descr = after(header, "'descr'");
  for (size_t i = 0; i < DESCRS && array->dtype == 0; i++)
    if (descr[0] == '\'' && strncmp(descr + 1, descrs[i].descr, 3) == 0 && descr[4] == '\'')
      array->dtype = descrs[i].dtype;
  if (array->dtype == 0) return bad_npy(problem, where, "another dtype or byte order");
  if (!parse_shape(after(header, "'shape'"), array)) return bad_npy(problem, where, "its shape");
  if (strncmp(after(header, "'fortran_order'"), "False", 5) != 0 && array->rank > 1)
    return bad_npy(problem, where, "it is in Fortran order");
  if (!tcr_bytes_of(array->dtype, array->rank, array->shape, &array->bytes) || array->bytes > bytes - start - length)
    return bad_npy(problem, where, "it is shorter than its shape says");
  array->data = data + start + length;
  return TC_OK;
}

size_t tcr_npy_header(int32_t dtype, int32_t rank, const int64_t *shape, char header[256]) {
  tcr_text text = {header, 256, 10};
  memcpy(header, "\x93NUMPY\x01\x00", 8);
  size_t index = 0;
  while (index + 1 < DESCRS && descrs[index].dtype != dtype) index++;
  tcr_append(&text, "{'descr': '%s', 'fortran_order': False, 'shape': (", descrs[index].descr);
  for (int32_t i = 0; i < rank; i++)
    tcr_append(&text, "%lld%s", (long long)shape[i], rank == 1 ? "," : i + 1 < rank ? ", " : "");
  tcr_append(&text, "), }");
  while (text.length % 64 != 63) tcr_append(&text, " ");
  tcr_append(&text, "\n");
  header[8] = (char)((text.length - 10) & 255);
  header[9] = (char)((text.length - 10) >> 8);
  return text.length;
}

static uint64_t little(const unsigned char *at, int bytes) {
  uint64_t value = 0;
  while (bytes--) value = value << 8 | at[bytes];
  return value;
}

typedef struct entry {
  const char *name;
  size_t name_length;
  unsigned method;
  uint64_t size, stored, offset;
} entry;

static int32_t bad_zip(tcr_problem *problem, const char *where, const char *what) {
  return tcr_fail(problem, TC_BAD_INPUT, where, "write it with numpy.savez",
                  "is not an archive of arrays that this runtime reads: %s", what);
}

/* The entries of the central directory one after another (APPNOTE.TXT 4.3.12); false at the end. */
static bool next_entry(const unsigned char *data, size_t end, size_t *at, entry *found) {
  if (end - *at < 46 || little(data + *at, 4) != 0x02014b50) return false;
  const unsigned char *head = data + *at;
  found->method = (unsigned)little(head + 10, 2);
  found->stored = little(head + 20, 4);
  found->size = little(head + 24, 4);
  found->name_length = (size_t)little(head + 28, 2);
  found->offset = little(head + 42, 4);
  found->name = (const char *)head + 46;
  size_t length = 46 + found->name_length + (size_t)little(head + 30, 2) + (size_t)little(head + 32, 2);
  if (length > end - *at) return false;
  *at += length;
  return true;
}

static int32_t find_directory(const unsigned char *data, size_t bytes, const char *where, size_t *start, size_t *end,
                              tcr_problem *problem) {
  size_t lowest = bytes > 65557 ? bytes - 65557 : 0;
  for (size_t at = bytes < 22 ? 0 : bytes - 21; at-- > lowest;) {
    if (little(data + at, 4) != 0x06054b50) continue;
    uint64_t size = little(data + at + 12, 4), offset = little(data + at + 16, 4);
    if (offset > at || size > at - offset) return bad_zip(problem, where, "its directory lies outside of it");
    *start = (size_t)offset;
    *end = (size_t)(offset + size);
    return TC_OK;
  }
  return bad_zip(problem, where, "it has no directory; is it truncated?");
}

static int32_t member(const unsigned char *data, size_t bytes, const char *where, const entry *found, tcr_array *array,
                      tcr_problem *problem) {
  if (found->method != 0) return bad_zip(problem, where, "it is compressed");
  if (found->size != found->stored || found->offset > bytes || bytes - found->offset < 30)
    return bad_zip(problem, where, "a member lies outside of it");
  const unsigned char *head = data + found->offset;
  size_t start = 30 + (size_t)little(head + 26, 2) + (size_t)little(head + 28, 2);
  if (little(head, 4) != 0x04034b50 || start > bytes - found->offset || found->size > bytes - found->offset - start)
    return bad_zip(problem, where, "a member lies outside of it");
  return tcr_parse_npy(head + start, (size_t)found->size, where, array, problem);
}

int32_t tcr_find_npz(const unsigned char *data, size_t bytes, const char *where, const char *name, tcr_array *array,
                     tcr_problem *problem) {
  size_t at, end, length = strlen(name);
  entry found;
  memset(array, 0, sizeof *array);
  int32_t status = find_directory(data, bytes, where, &at, &end, problem);
  if (status != TC_OK) return status;
  while (next_entry(data, end, &at, &found))
    if (found.name_length == length + 4 && memcmp(found.name, name, length) == 0 &&
        memcmp(found.name + length, ".npy", 4) == 0)
      return member(data, bytes, where, &found, array, problem);
  return TC_OK;
}

int32_t tcr_count_npz(const unsigned char *data, size_t bytes, const char *where, const char *prefix, uint32_t *count,
                      tcr_problem *problem) {
  size_t at, end, length = strlen(prefix);
  entry found;
  *count = 0;
  int32_t status = find_directory(data, bytes, where, &at, &end, problem);
  while (status == TC_OK && next_entry(data, end, &at, &found))
    if (found.name_length >= length && memcmp(found.name, prefix, length) == 0) ++*count;
  return status;
}

static double of_half(uint16_t bits) {
  int exponent = bits >> 10 & 31;
  double value = bits & 1023;
  if (exponent == 31)
    value = value != 0 ? NAN : INFINITY;
  else if (exponent == 0)
    value *= tcr_power_of_two(-24);
  else
    value = (value + 1024) * tcr_power_of_two(exponent - 25);
  return bits >> 15 ? -value : value;
}

#define AS(type)                                               \
  do {                                                         \
    type value;                                                \
    memcpy(&value, data + index * sizeof value, sizeof value); \
    return (double)value;                                      \
  } while (0)

double tcr_element(int32_t dtype, const unsigned char *data, size_t index) {
  uint16_t bits;
  switch (dtype) {
    case TC_BOOL: return data[index] != 0;
    case TC_INT8: AS(int8_t);
    case TC_INT16: AS(int16_t);
    case TC_INT32: AS(int32_t);
    case TC_INT64: AS(int64_t);
    case TC_UINT8: AS(uint8_t);
    case TC_UINT16: AS(uint16_t);
    case TC_UINT32: AS(uint32_t);
    case TC_UINT64: AS(uint64_t);
    case TC_FLOAT32: AS(float);
    case TC_FLOAT64: AS(double);
    default: memcpy(&bits, data + index * 2, 2); return of_half(bits);
  }
}
