/* JSON on standard output. */
#include <math.h>
#include <string.h>

#include "cli.h"

void cli_print_string(FILE *out, const char *text) {
  fputc('"', out);
  for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
    if (*c == '"' || *c == '\\')
      fprintf(out, "\\%c", *c);
    else if (*c < 0x20)
      fprintf(out, "\\u%04x", *c);
    else
      fputc(*c, out);
  }
  fputc('"', out);
}

/* JSON has neither NaN nor infinities. */
void cli_print_number(FILE *out, double value) {
  if (isfinite(value))
    fprintf(out, "%.9g", value);
  else
    fputs("null", out);
}

static void print_sizes(FILE *out, tc_bundle *bundle, int32_t rank, const int64_t *shape) {
  fputc('[', out);
  for (int32_t i = 0; i < rank; i++) {
    tc_dim_info dim = {sizeof dim, 0, "", 0, 0};
    if (i) fputs(", ", out);
    if (shape[i] >= 0)
      fprintf(out, "%lld", (long long)shape[i]);
    else if (bundle == NULL || tc_dim_at(bundle, (uint32_t)(-(shape[i] + 1)), &dim) != TC_OK)
      fputs("null", out);
    else
      cli_print_string(out, dim.name);
  }
  fputc(']', out);
}

void cli_print_tensor(FILE *out, tc_bundle *bundle, const tc_tensor_info *info) {
  fputs("{\"name\": ", out);
  cli_print_string(out, info->name);
  fprintf(out, ", \"dtype\": \"%s\", \"shape\": ", tcr_dtype_name(info->dtype));
  print_sizes(out, bundle, info->rank, info->shape);
  fputc('}', out);
}

static void print_element(FILE *out, const tc_value *value, size_t index) {
  int64_t whole;
  uint64_t positive;
  switch (value->dtype) {
    case TC_BOOL: fputs(tcr_element(TC_BOOL, value->data, index) != 0 ? "true" : "false", out); break;
    case TC_INT64:
      memcpy(&whole, (const char *)value->data + index * 8, 8);
      fprintf(out, "%lld", (long long)whole);
      break;
    case TC_UINT64:
      memcpy(&positive, (const char *)value->data + index * 8, 8);
      fprintf(out, "%llu", (unsigned long long)positive);
      break;
    case TC_FLOAT64:
      if (isfinite(tcr_element(TC_FLOAT64, value->data, index))) {
        fprintf(out, "%.17g", tcr_element(TC_FLOAT64, value->data, index));
        break;
      } /* fall through */
    default: cli_print_number(out, tcr_element(value->dtype, value->data, index));
  }
}

void cli_print_value(FILE *out, const char *name, const tc_value *value) {
  cli_print_string(out, name);
  fprintf(out, ": {\"dtype\": \"%s\", \"shape\": ", tcr_dtype_name(value->dtype));
  print_sizes(out, NULL, value->rank, value->shape);
  fputs(", \"values\": [", out);
  for (size_t i = 0; i < value->bytes / tc_item_size(value->dtype); i++) {
    if (i) fputs(", ", out);
    print_element(out, value, i);
  }
  fputs("]}", out);
}
