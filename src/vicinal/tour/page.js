// Point at the photograph, and every panel shows what that token sees. All it needs are the panels' tables.
const [height, width] = JSON.parse(document.getElementById("grid").textContent);
const cell = ([row, column]) => `M${column} ${row}h1v1h-1z`;

function keysAlong(axis, query) {
  const place = (number) => axis.start[query] + axis.step * number;
  const turned = (key) => ((key % axis.length) + axis.length) % axis.length;
  return Array.from({ length: axis.count[query] }, (_, number) => turned(place(number)));
}

function keysOf(members, query) {
  const found = new Map();
  for (const [rows, columns] of members)
    for (const row of keysAlong(rows, query[0]))
      for (const column of keysAlong(columns, query[1])) found.set(row * width + column, [row, column]);
  return [...found.values()];
}

function show(panel, query) {
  const groups = panel.groups.map((members) => keysOf(members, query));
  const either = new Map(groups.flat().map((key) => [String(key), key]));
  panel.svg.querySelector(".seen").setAttribute("d", [...either.values()].map(cell).join(""));
  groups.forEach((keys, number) => panel.svg.querySelector(`.group${number}`).setAttribute("d", keys.map(cell).join("")));
  const mark = panel.svg.querySelector(".query");
  mark.setAttribute("x", query[1]);
  mark.setAttribute("y", query[0]);
  panel.number.textContent = `${groups.map((keys) => keys.length).join(" + ")} of ${height * width} keys`;
}

const panels = [...document.querySelectorAll(".photo")].map((photo) => ({
  photo,
  svg: photo.querySelector("svg"),
  number: photo.parentElement.querySelector(".number"),
  groups: JSON.parse(photo.dataset.tables),
  home: JSON.parse(photo.dataset.query),
}));

for (const { photo } of panels) {
  photo.addEventListener("pointermove", (event) => {
    const box = photo.getBoundingClientRect();
    const along = (place, length) => Math.min(length - 1, Math.max(0, Math.floor(place * length)));
    const query = [along((event.clientY - box.top) / box.height, height), along((event.clientX - box.left) / box.width, width)];
    panels.forEach((panel) => show(panel, query));
  });
  photo.addEventListener("pointerleave", () => panels.forEach((panel) => show(panel, panel.home)));
}
