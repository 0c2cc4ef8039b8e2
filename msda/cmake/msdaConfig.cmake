# find_package(msda): the operator for LibTorch programs, without Python.
#
#   find_package(msda REQUIRED)
#   target_link_libraries(program PRIVATE msda::msda)
#
# Found where CMAKE_PREFIX_PATH holds the folder of the package msda, and that of torch:
#   python -c "import msda, torch; print(*msda.__path__, torch.utils.cmake_prefix_path, sep=';')"
#
# Loading the library registers torch.ops.msda: it is linked although no symbol of it is named.

include(CMakeFindDependencyMacro)
find_dependency(Torch)

if(NOT TARGET msda::msda)
  get_filename_component(msda_folder "${CMAKE_CURRENT_LIST_DIR}" DIRECTORY)
  find_library(MSDA_LIBRARY msda HINTS "${msda_folder}" NO_DEFAULT_PATH)
  if(NOT MSDA_LIBRARY)
    set(msda_FOUND FALSE)
    set(msda_NOT_FOUND_MESSAGE "${msda_folder} holds no compiled library: build msda there.")
    return()
  endif()
  add_library(msda::msda SHARED IMPORTED)
  set_target_properties(msda::msda PROPERTIES IMPORTED_LOCATION "${MSDA_LIBRARY}")
  target_link_libraries(msda::msda INTERFACE ${TORCH_LIBRARIES})
  if(NOT APPLE)
    target_link_options(msda::msda INTERFACE "LINKER:--no-as-needed")
  endif()
endif()
