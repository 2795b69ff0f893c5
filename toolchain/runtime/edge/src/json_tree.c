/* Values of JSON that was read. */
#include <string.h>

#include "json.h"

bool json_is(const json_value *value, json_kind kind) { return value != NULL && value->kind == kind; }

const json_value *json_get(const json_value *object, const char *key) {
  const json_value *found = NULL;
  if (!json_is(object, JSON_OBJECT)) return NULL;
  for (const json_value *child = object->as.first; child; child = child->next)
    if (strcmp(child->key, key) == 0) found = child;
  return found;
}

const char *json_text(const json_value *value) { return json_is(value, JSON_STRING) ? value->as.text : NULL; }

bool json_equal(const json_value *one, const json_value *other) {
  if (one == NULL || other == NULL || one->kind != other->kind || one->count != other->count) return false;
  switch (one->kind) {
    case JSON_BOOL: return one->truth == other->truth;
    case JSON_NUMBER: return one->as.number == other->as.number;
    case JSON_STRING: return strcmp(one->as.text, other->as.text) == 0;
    case JSON_LIST:
      for (const json_value *a = one->as.first, *b = other->as.first; a; a = a->next, b = b->next)
        if (!json_equal(a, b)) return false;
      return true;
    case JSON_OBJECT:
      for (const json_value *a = one->as.first; a; a = a->next)
        if (!json_equal(a, json_get(other, a->key))) return false;
      return true;
    default: return true;
  }
}

bool json_text_is(const json_value *object, const char *key, const char *text) {
  const char *got = json_text(json_get(object, key));
  return got != NULL && strcmp(got, text) == 0;
}
