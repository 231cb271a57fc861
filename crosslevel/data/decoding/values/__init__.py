"""Files of values that are no bytes of a picture by themselves: arrays, DICOM, bands of TIFF."""
