"""Annotated images in the layouts of Pascal VOC, COCO and YOLO, and the objects cut out of them."""
