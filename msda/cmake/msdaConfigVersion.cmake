# The version of msda, as in the package; one with the same major number will do.

file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/../_version.py" version_line REGEX "__version__")
string(REGEX MATCH "([0-9]+)\\.[0-9]+\\.[0-9]+" PACKAGE_VERSION "${version_line}")
if(PACKAGE_FIND_VERSION VERSION_GREATER PACKAGE_VERSION
    OR NOT PACKAGE_FIND_VERSION_MAJOR STREQUAL CMAKE_MATCH_1)
  set(PACKAGE_VERSION_COMPATIBLE FALSE)
else()
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
  if(PACKAGE_FIND_VERSION VERSION_EQUAL PACKAGE_VERSION)
    set(PACKAGE_VERSION_EXACT TRUE)
  endif()
endif()
