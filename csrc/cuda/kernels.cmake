# The kernels for CUDA as a part of the library: from every csrc/cuda/*.cu an object for each number of modalities and
# each architecture, from these a fatbin for each number of modalities, and one C++ file that holds all fatbins
# (images.cpp.in), from where driver.cpp loads them. CUDA is none of CMake's languages here: enabling that fails where
# there is no toolkit, and ties a library to the CUDA runtime.
#
# Defines the object library `cuda_images`. Without kernels it says why there are none.

set(PMRL_CUDA AUTO CACHE STRING "Kernels for CUDA: AUTO (where there is an nvcc that works), ON (else fail) or OFF")
set(PMRL_CUDA_REASON "" CACHE STRING "Why PMRL_CUDA is OFF, for the build record")
set(PMRL_CUDA_ARCHITECTURES "" CACHE STRING "Compute capabilities, such as 80;90; without any, all of the default")
set(PMRL_CUDA_MODALITIES "2;3;4;5;6;7;8" CACHE STRING "The numbers of modalities that kernels are compiled for")
set(PMRL_NVCC_HINTS "" CACHE STRING "Where else an nvcc may be, after CUDA_HOME, the PATH and /usr/local/cuda")
set(PMRL_PTXAS "" CACHE STRING "Assemblers in place of nvcc 13's own: the first one of CUDA 12.8 or 12.9 is taken")
# A newer minor number runs the code of an older one: 8.9 that of 8.6, 12.1 that of 12.0. What is of no major number here,
# and newer than 9.0, would get what its driver makes of the PTX. But a card whose float64 is slow runs nothing that sums
# in it, as code for 8.0, 9.0 and 10.0 does (sums.cuh): driver.cpp refuses that for 10.3 and 11.0. Each costs the library
# about as much as the PTX does.
set(cuda_wanted 75 80 86 90 100 120)
set(cuda_ptx_architecture 90)

if(NOT PMRL_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "PMRL_CUDA: got '${PMRL_CUDA}', wanted AUTO, ON or OFF")
endif()
set(cuda_folder ${CMAKE_CURRENT_BINARY_DIR}/cuda)
set(cuda_older_ptx ${CMAKE_CURRENT_LIST_DIR}/older_ptx.cmake)
file(MAKE_DIRECTORY ${cuda_folder})

# ---- what there is to compile with; cuda_reason: why there is nothing ---------------------------

# "13.0.88", as one of CUDA's tools says.
function(tool_version output tool)
  execute_process(COMMAND ${tool} --version OUTPUT_VARIABLE told ERROR_VARIABLE told)
  string(REGEX MATCH "V([0-9]+\\.[0-9]+\\.[0-9]+)" found "${told}")
  set(${output} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

set(cuda_reason "")
set(cuda_nvcc_version "")
file(GLOB cuda_sources RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} CONFIGURE_DEPENDS csrc/cuda/*.cu)
if(PMRL_CUDA STREQUAL "OFF")
  set(cuda_reason "PMRL_CUDA is OFF")
  if(PMRL_CUDA_REASON)
    set(cuda_reason "${PMRL_CUDA_REASON}")
  endif()
elseif(NOT cuda_sources)
  set(cuda_reason "there are no sources of any in csrc/cuda")
endif()

if(NOT cuda_reason)
  find_program(PMRL_NVCC nvcc HINTS ENV CUDA_HOME PATH_SUFFIXES bin)
  find_program(PMRL_NVCC nvcc PATHS /usr/local/cuda/bin ${PMRL_NVCC_HINTS} NO_DEFAULT_PATH)
  if(NOT PMRL_NVCC)
    string(CONCAT cuda_reason "no nvcc was found at installation (looked for it in CUDA_HOME, on the PATH, in "
                              "/usr/local/cuda and among the packages of pip)")
  endif()
endif()

if(NOT cuda_reason)
  get_filename_component(cuda_bin ${PMRL_NVCC} DIRECTORY)
  get_filename_component(cuda_real ${PMRL_NVCC} REALPATH) # a link to it has no other tools beside it
  get_filename_component(cuda_real ${cuda_real} DIRECTORY)
  foreach(tool fatbinary ptxas)
    unset(cuda_${tool} CACHE)
    find_program(cuda_${tool} ${tool} HINTS ${cuda_bin} ${cuda_real})
    mark_as_advanced(cuda_${tool})
  endforeach()
  tool_version(cuda_nvcc_version ${PMRL_NVCC})
  if(cuda_nvcc_version VERSION_LESS 12.0)
    set(cuda_reason "wanted an nvcc of CUDA 12.0 or newer at installation, got '${cuda_nvcc_version}'")
  elseif(NOT cuda_fatbinary OR NOT cuda_ptxas)
    set(cuda_reason "no fatbinary or no ptxas was found at installation, as belong to nvcc ${cuda_nvcc_version}")
  endif()
endif()

if(NOT cuda_reason)
  execute_process(COMMAND ${PMRL_NVCC} --list-gpu-code OUTPUT_VARIABLE cuda_known ERROR_QUIET)
  string(REGEX MATCHALL "sm_[0-9]+" cuda_known "${cuda_known}")
  if(PMRL_CUDA_ARCHITECTURES)
    set(cuda_wanted ${PMRL_CUDA_ARCHITECTURES})
  endif()
  set(cuda_architectures "")
  foreach(architecture IN LISTS cuda_wanted)
    if(sm_${architecture} IN_LIST cuda_known)
      list(APPEND cuda_architectures ${architecture})
    elseif(PMRL_CUDA_ARCHITECTURES)
      set(cuda_reason "nvcc ${cuda_nvcc_version} does not compile for ${architecture} of PMRL_CUDA_ARCHITECTURES")
    endif()
  endforeach()
  if(NOT cuda_architectures AND NOT cuda_reason)
    set(cuda_reason "nvcc ${cuda_nvcc_version} compiles for none of ${cuda_wanted}")
  endif()
endif()

if(NOT cuda_reason)
  if(NOT cuda_ptx_architecture IN_LIST cuda_architectures)
    list(GET cuda_architectures -1 cuda_ptx_architecture)
  endif()

  # Drivers of CUDA 12 refuse what the assembler of CUDA 13 makes. That of CUDA 12.8 takes nvcc 13's PTX, once this
  # claims to be of the version it knows; and refuses what it does not know.
  set(cuda_assembler ${cuda_ptxas})
  tool_version(cuda_assembler_version ${cuda_ptxas})
  set(cuda_ptx_version "")
  if(cuda_nvcc_version VERSION_GREATER_EQUAL 13)
    foreach(ptxas IN LISTS PMRL_PTXAS)
      tool_version(version ${ptxas})
      if(NOT cuda_ptx_version AND version VERSION_GREATER_EQUAL 12.8 AND version VERSION_LESS 13)
        set(cuda_assembler ${ptxas})
        set(cuda_assembler_version ${version})
        set(cuda_ptx_version 8.7)
      endif()
    endforeach()
  endif()
  # Which CUDA a driver has to be of: objects want the major version alone.
  string(REGEX MATCH "^([0-9]+)\\.([0-9]+)" version "${cuda_assembler_version}")
  math(EXPR cuda_object_driver "${CMAKE_MATCH_1} * 1000")
  set(cuda_pack ${cuda_fatbinary} -64 --compress-all)
  if(cuda_nvcc_version VERSION_GREATER_EQUAL 12.8) # less by a fourth than without, and that by drivers since 12.4
    list(APPEND cuda_pack --compress-mode=size)
    if(cuda_object_driver LESS 12040)
      set(cuda_object_driver 12040)
    endif()
  endif()
  if(cuda_ptx_version)
    set(cuda_ptx_driver 12080)
  else()
    string(REGEX MATCH "^([0-9]+)\\.([0-9]+)" version "${cuda_nvcc_version}")
    math(EXPR cuda_ptx_driver "${CMAKE_MATCH_1} * 1000 + ${CMAKE_MATCH_2} * 10")
  endif()
  set(cuda_host_compiler "")
  if(NOT DEFINED ENV{NVCC_CCBIN})
    set(cuda_host_compiler -ccbin ${CMAKE_CXX_COMPILER})
  endif()
endif()

# The commands that make cuda/NAME.ptx of a source, and cuda/NAME.cubin of that.
function(cuda_commands output name source architecture)
  cmake_parse_arguments(PARSE_ARGV 4 for "" "" "NVCC;PTXAS")
  set(ptx ${cuda_folder}/${name}.ptx)
  # Divisions and roots of float32 may be approximate: only angles of rotations take any.
  set(commands COMMAND ${PMRL_NVCC} -std=c++17 -O3 -prec-div=false -prec-sqrt=false ${cuda_host_compiler} -ptx
                       -arch=compute_${architecture} ${for_NVCC} ${source} -o ${ptx})
  if(cuda_ptx_version)
    list(APPEND commands COMMAND ${CMAKE_COMMAND} -DPTX=${ptx} -DVERSION=${cuda_ptx_version} -P ${cuda_older_ptx})
  endif()
  list(APPEND commands COMMAND ${cuda_assembler} -arch=sm_${architecture} ${for_PTXAS} ${ptx} -o
                       ${cuda_folder}/${name}.cubin)
  set(${output} ${commands} PARENT_SCOPE)
endfunction()

# Whether one kernel goes all the way: nvcc may lack some of its parts, or not take the C++ compiler.
if(NOT cuda_reason)
  set(trial ${cuda_folder}/trial)
  file(WRITE ${trial}.cu "extern \"C\" __global__ void trial(float* x) { x[threadIdx.x] += 1; }\n")
  list(GET cuda_architectures 0 architecture)
  cuda_commands(commands trial ${trial}.cu ${architecture})
  list(APPEND commands COMMAND ${cuda_pack} --create=${trial}.fatbin
                       --image3=kind=elf,sm=${architecture},file=${trial}.cubin COMMAND)
  set(command "")
  foreach(word IN LISTS commands) # given all at once they would be a pipeline
    if(NOT word STREQUAL "COMMAND")
      list(APPEND command ${word})
    elseif(command AND NOT cuda_reason)
      execute_process(COMMAND ${command} OUTPUT_VARIABLE told ERROR_VARIABLE told RESULT_VARIABLE status)
      if(NOT status EQUAL 0)
        string(REGEX MATCH "[^\n]*([Ee]rror|[Ff]atal|not found|annot)[^\n]*" line "${told}")
        if(NOT line)
          set(line "exit status ${status}")
        endif()
        set(cuda_reason "nvcc ${cuda_nvcc_version} compiled nothing at installation: ${line}")
      endif()
      set(command "")
    endif()
  endforeach()
endif()

if(cuda_reason AND PMRL_CUDA STREQUAL "ON")
  message(FATAL_ERROR "PMRL_CUDA is ON, but no kernels for CUDA can be compiled: ${cuda_reason}")
endif()

# ---- objects, fatbins, and the file that holds them ---------------------------------------------

set(cuda_fatbins "")
set(cuda_declarations "")
set(cuda_table "")
if(cuda_reason)
  message(STATUS "No kernels for CUDA: ${cuda_reason}")
  set(cuda_names "")
  set(cuda_compiler "")
  set(cuda_architectures 0)
  set(cuda_numbers "0, 0, 0")
else()
  foreach(source IN LISTS cuda_sources)
    get_filename_component(stem ${source} NAME_WE)
    foreach(k IN LISTS PMRL_CUDA_MODALITIES)
      set(warnings "")
      if(k LESS 8) # up to here all of an instance is to fit into registers, or nearly
        set(warnings -warn-spills -warn-lmem-usage)
      endif()
      set(objects "")
      set(images "")
      foreach(architecture IN LISTS cuda_architectures)
        set(name ${stem}_${k}_sm_${architecture})
        cuda_commands(
          commands ${name} ${CMAKE_CURRENT_SOURCE_DIR}/${source} ${architecture}
          NVCC -DPMRL_K=${k} -I ${CMAKE_CURRENT_SOURCE_DIR}/csrc -MD -MF ${cuda_folder}/${name}.d -MT cuda/${name}.cubin
          PTXAS ${warnings})
        add_custom_command(
          OUTPUT ${cuda_folder}/${name}.cubin
          BYPRODUCTS ${cuda_folder}/${name}.ptx ${commands}
          DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${source} ${cuda_older_ptx}
          DEPFILE ${cuda_folder}/${name}.d
          COMMENT "Compiling ${source}, k = ${k}, sm_${architecture}"
          VERBATIM)
        list(APPEND objects ${cuda_folder}/${name}.cubin)
        list(APPEND images --image3=kind=elf,sm=${architecture},file=${cuda_folder}/${name}.cubin)
        if(architecture EQUAL cuda_ptx_architecture)
          list(APPEND images --image3=kind=ptx,sm=${architecture},file=${cuda_folder}/${name}.ptx)
        endif()
      endforeach()
      set(fatbin ${cuda_folder}/${stem}_${k}.fatbin)
      add_custom_command(
        OUTPUT ${fatbin}
        COMMAND ${cuda_pack} --create=${fatbin} ${images}
        DEPENDS ${objects}
        COMMENT "Packing ${stem}_${k}.fatbin"
        VERBATIM)
      list(APPEND cuda_fatbins ${fatbin})
      string(APPEND cuda_declarations "PMRL_IMAGE(pmrl_image_${stem}_${k}, \"${fatbin}\")\n")
      string(APPEND cuda_table "    {${k}, pmrl_image_${stem}_${k}},\n")
    endforeach()
  endforeach()
  set(cuda_names "")
  foreach(architecture IN LISTS cuda_architectures)
    string(APPEND cuda_names "sm_${architecture} ")
  endforeach()
  string(APPEND cuda_names "compute_${cuda_ptx_architecture}")
  string(REPLACE ";" ", " cuda_architectures "${cuda_architectures}")
  set(cuda_numbers "${cuda_ptx_architecture}, ${cuda_object_driver}, ${cuda_ptx_driver}")
  set(cuda_compiler "nvcc ${cuda_nvcc_version}, ptxas ${cuda_assembler_version}")
  message(STATUS "Kernels for CUDA: ${cuda_names}, by ${PMRL_NVCC} (${cuda_compiler}: ${cuda_assembler})")
endif()
foreach(folder IN ITEMS ${cuda_folder} ${CMAKE_CURRENT_SOURCE_DIR}) # the library holds no path of where it was built
  string(REPLACE "${folder}/" "" cuda_reason "${cuda_reason}")
endforeach()
string(REGEX REPLACE "([\\\\\"])" "\\\\\\1" cuda_reason "${cuda_reason}")
string(REGEX REPLACE "[\r\n]+" " " cuda_reason "${cuda_reason}")
configure_file(${CMAKE_CURRENT_LIST_DIR}/images.cpp.in ${cuda_folder}/images.cpp @ONLY)
add_library(cuda_images OBJECT ${cuda_folder}/images.cpp)
target_include_directories(cuda_images PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
set_source_files_properties(${cuda_folder}/images.cpp PROPERTIES OBJECT_DEPENDS "${cuda_fatbins}")
