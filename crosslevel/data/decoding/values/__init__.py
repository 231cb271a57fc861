"""Files whose values are not 8-bit pixels: arrays, DICOM, bands of TIFF."""
