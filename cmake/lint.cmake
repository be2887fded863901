# `lint`: clang-format over every source (always part of the build, it takes a second) and clang-tidy over every
# translation unit of our own (target `tidy`, part of ./quickstart test).
find_program(CLANG_FORMAT NAMES clang-format-14 clang-format REQUIRED)
find_program(RUN_CLANG_TIDY NAMES run-clang-tidy-14 run-clang-tidy REQUIRED)
file(GLOB_RECURSE lint_files CONFIGURE_DEPENDS
  ${CMAKE_SOURCE_DIR}/codegen/*.cpp ${CMAKE_SOURCE_DIR}/codegen/*.h ${CMAKE_SOURCE_DIR}/cache/*.cpp ${CMAKE_SOURCE_DIR}/cache/*.h
  ${CMAKE_SOURCE_DIR}/runtime/*.cpp ${CMAKE_SOURCE_DIR}/runtime/*.h ${CMAKE_SOURCE_DIR}/tools/*.cpp ${CMAKE_SOURCE_DIR}/tools/*.h
  ${CMAKE_SOURCE_DIR}/tests/*.cpp ${CMAKE_SOURCE_DIR}/tests/*.h ${CMAKE_SOURCE_DIR}/templates/cuda/*.cu
  ${CMAKE_SOURCE_DIR}/templates/cuda/*.cuh)
set(stamp ${CMAKE_BINARY_DIR}/format.stamp)
add_custom_command(
  OUTPUT ${stamp}
  COMMAND ${CLANG_FORMAT} --dry-run --Werror ${lint_files}
  COMMAND ${CMAKE_COMMAND} -E touch ${stamp}
  DEPENDS ${lint_files} ${CMAKE_SOURCE_DIR}/.clang-format
  COMMENT "clang-format (cmake --build . --target format mends)"
  VERBATIM)
add_custom_target(lint ALL DEPENDS ${stamp})
add_custom_target(format COMMAND ${CLANG_FORMAT} -i ${lint_files} VERBATIM)
# bash -o pipefail: the output is large and only findings matter.
add_custom_target(tidy
  COMMAND ${RUN_CLANG_TIDY} -quiet -extra-arg=-Wno-unknown-warning-option -p ${CMAKE_BINARY_DIR} "${CMAKE_SOURCE_DIR}/(codegen|cache|runtime|tools)/.*"
  VERBATIM USES_TERMINAL)
