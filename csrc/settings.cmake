# What the builds of the library and of csrc/runtimes have in common. Included before project().
#
# Sets MSDA_VERSION, and warnings for target_compile_options. Option: MSDA_WERROR, which makes all
# warnings errors.

file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/../msda/_version.py" version_line REGEX "__version__")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" MSDA_VERSION "${version_line}")

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

# A switch over dtypes that lacks one must not compile: see dtypes.h.
set(warnings -Wall -Wextra -Werror=switch)
if(MSDA_WERROR)
  list(APPEND warnings -Werror)
endif()
