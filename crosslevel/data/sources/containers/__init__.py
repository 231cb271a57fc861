"""Many images in one file: tar shards, Parquet files, data sets of the hub; on this disk or elsewhere."""
