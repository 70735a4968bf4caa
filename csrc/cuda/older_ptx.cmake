# cmake -DPTX=file -DVERSION=8.7 -P older_ptx.cmake: the file then claims to be of that version of PTX.
file(READ ${PTX} text)
string(REGEX REPLACE "\n\\.version [0-9.]+" "\n.version ${VERSION}" text "${text}")
file(WRITE ${PTX} "${text}")
