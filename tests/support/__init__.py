"""What the tests stand on; nothing here imports `shmblocks`, so that it can judge the library."""
