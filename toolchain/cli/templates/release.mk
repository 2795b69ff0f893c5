# Builds the release of @NAME@.  Written by `toolchain init`; use it by `include release.mk` in a Makefile.
#
#   make release    builds when the recipe, the checkpoint, a Python file that the recipe names, or a file of this
#                   repository that one of them imports, is newer than the release
#
# `toolchain build` looks closer: it compares contents, follows what the code really reads, and runs only the
# stages that the change concerns.  `make -B release` asks it in any case.

TOOLCHAIN ?= toolchain
RELEASE_FOLDER := $(dir $(lastword $(MAKEFILE_LIST)))
RELEASE_RECIPE := $(RELEASE_FOLDER)@RECIPE@
RELEASE_ARTIFACTS ?= $(RELEASE_FOLDER)artifacts
# Files that the data functions read: make cannot see those, so name them, e.g. RELEASE_DATA := data/test.csv
RELEASE_DATA ?=

# The list of source files is itself made by make, and made again when one of them changes.
RELEASE_DEPENDENCIES := $(RELEASE_ARTIFACTS)/.@NAME@.d
RELEASE_SOURCES :=
-include $(RELEASE_DEPENDENCIES)

.PHONY: release
ifneq ($(RELEASE_SOURCES),)
RELEASE_INDEX := $(RELEASE_ARTIFACTS)/$(RELEASE_NAME)/$(RELEASE_VERSION)/index.json

release: $(RELEASE_INDEX)

$(RELEASE_INDEX): $(RELEASE_SOURCES) $(RELEASE_DATA)
	$(TOOLCHAIN) build $(RELEASE_RECIPE) --output $(RELEASE_ARTIFACTS)
	@touch $@

# A source that has been deleted makes the list anew, not an error.
$(RELEASE_SOURCES):
else
release:
	@echo "release: the sources could not be listed, for the reason above" >&2; exit 1
endif

# make starts anew once the list is made; once is enough, even if a source's time lies in the future.
ifeq ($(MAKE_RESTARTS),)
$(RELEASE_DEPENDENCIES): $(RELEASE_RECIPE) $(RELEASE_SOURCES)
	@mkdir -p $(@D)
	@$(TOOLCHAIN) init --dependencies $(RELEASE_RECIPE) > $@.new && mv $@.new $@
endif
