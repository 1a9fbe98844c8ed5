# Links the sources beside this file into libllama. cmake reads it right after llama.cpp's project(), by
# CMAKE_PROJECT_llama.cpp_INCLUDE, so that no file of llama.cpp's is changed for it.
set(STEP35_SRC "${CMAKE_CURRENT_LIST_DIR}")

function(step35_link)
    file(GLOB sources CONFIGURE_DEPENDS "${STEP35_SRC}/*.cpp")
    target_sources(llama PRIVATE ${sources})
    target_include_directories(llama PRIVATE "${STEP35_SRC}")
    # llama.cpp compiles its models many to a unit; ours stand alone
    set_source_files_properties(${sources} TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
    set_source_files_properties("${STEP35_SRC}/step35_build.cpp" TARGET_DIRECTORY llama
        PROPERTIES COMPILE_DEFINITIONS "STEP35_BUILD=\"${STEP35_BUILD}\"")
endfunction()

cmake_language(DEFER CALL step35_link)
