"""Objects cut out of annotated images (Pascal VOC, COCO)."""
