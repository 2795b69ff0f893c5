# Builds the release of @NAME@.  Written by `toolchain init`; use it by `include @FRAGMENT@` in a Makefile.
#
# `make @GOAL@` builds when the recipe, the checkpoint, a Python file that the recipe names, or a file of this
# repository that one of them imports, is newer than the release.
#
# `toolchain build` looks closer: it compares contents, follows what the code really reads, and runs only the
# stages that the change concerns.  `make -B @GOAL@` asks it in any case.

TOOLCHAIN ?= toolchain
@P@_FOLDER := $(dir $(lastword $(MAKEFILE_LIST)))
@P@_RECIPE := $(@P@_FOLDER)@RECIPE@
@P@_ARTIFACTS ?= $(@P@_FOLDER)artifacts
# Files that the data functions read: make cannot see those, so name them, e.g. @P@_DATA := data/test.csv
@P@_DATA ?=

# The list of source files is itself made by make, and made again when one of them changes.
@P@_DEPENDENCIES := $(@P@_ARTIFACTS)/.@NAME@.d
RELEASE_SOURCES :=
-include $(@P@_DEPENDENCIES)

@ALSO@.PHONY: @GOAL@
ifneq ($(RELEASE_SOURCES),)
@P@_INDEX := $(@P@_ARTIFACTS)/$(RELEASE_NAME)/$(RELEASE_VERSION)/index.json

@GOAL@: $(@P@_INDEX)

$(@P@_INDEX): $(RELEASE_SOURCES) $(@P@_DATA)
	$(TOOLCHAIN) build $(@P@_RECIPE) --output $(@P@_ARTIFACTS)
	@touch $@

# A source that has been deleted makes the list anew, not an error.
$(RELEASE_SOURCES):
else
@GOAL@:
	@echo "@GOAL@: the sources could not be listed, for the reason above" >&2; exit 1
endif

# make starts anew once the list is made; once is enough, even if a source's time lies in the future.
ifeq ($(MAKE_RESTARTS),)
$(@P@_DEPENDENCIES): $(@P@_RECIPE) $(RELEASE_SOURCES)
	@mkdir -p $(@D)
	@$(TOOLCHAIN) init --dependencies $(@P@_RECIPE) > $@.new && mv $@.new $@
endif
