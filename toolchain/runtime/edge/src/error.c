#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

static void append_list(tcr_text *text, const char *format, va_list list) {
  size_t left = text->length < text->bytes ? text->bytes - text->length : 0;
  int length = vsnprintf(left ? text->at + text->length : NULL, left, format, list);
  if (length > 0) text->length += (size_t)length;
}

void tcr_append(tcr_text *text, const char *format, ...) {
  va_list list;
  va_start(list, format);
  append_list(text, format, list);
  va_end(list);
}

static int32_t fail_list(tcr_problem *problem, int32_t status, const char *where, const char *hint, const char *what,
                         va_list list) {
  char line[TCR_TEXT];
  tcr_text text = {line, sizeof line, 0};
  line[0] = 0;
  if (where[0]) tcr_append(&text, "%s: ", where);
  append_list(&text, what, list);
  if (hint[0]) tcr_append(&text, "\n  hint: %s", hint);
  /* In two steps, since an argument may be the text of an earlier problem. */
  memcpy(problem->text, line, sizeof line);
  problem->status = status;
  return status;
}

int32_t tcr_fail(tcr_problem *problem, int32_t status, const char *where, const char *hint, const char *what, ...) {
  va_list list;
  va_start(list, what);
  fail_list(problem, status, where, hint, what, list);
  va_end(list);
  return status;
}

int32_t tcr_damaged(tcr_problem *problem, const char *where, const char *what, ...) {
  va_list list;
  va_start(list, what);
  fail_list(problem, TC_DAMAGED_BUNDLE, where, "fetch or build the bundle again", what, list);
  va_end(list);
  return TC_DAMAGED_BUNDLE;
}

int32_t tcr_no_memory(tcr_problem *problem, uint64_t bytes, const char *what) {
  return tcr_fail(problem, TC_NO_MEMORY, "", "give the process more memory, or take a smaller model",
                  "there is not enough memory for %s (%llu bytes)", what, (unsigned long long)bytes);
}

static const struct {
  const char *name;
  int code;
} statuses[] = {
    /* The codes of docs/exit-codes.md. */
    {"OK", 0},         {"USAGE", 2},      {"INCOMPATIBLE_HOST", 30}, {"DAMAGED_BUNDLE", 31}, {"BAD_INPUT", 32},
    {"NO_ENGINE", 40}, {"STORAGE", 41},   {"NO_MEMORY", 30},         {"BUSY", 70},           {"FAILED", 17},
    {"TOO_SMALL", 2},  {"SELF_TEST", 20}, {"INTERNAL", 70},
};

const char *tc_status_name(int32_t status) {
  return status >= 0 && status <= TC_INTERNAL ? statuses[status].name : "INTERNAL";
}

int32_t tc_exit_code(int32_t status) { return status >= 0 && status <= TC_INTERNAL ? statuses[status].code : 70; }
